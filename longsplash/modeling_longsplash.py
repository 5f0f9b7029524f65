"""The code of this model is the package longsplash; with this file `trust_remote_code=True` finds it.

Every exported entmax model holds a copy, for programs that import nothing of ours, such as lm-eval's command line.
"""

from longsplash.hub import LongSplashConfig, LongSplashForCausalLM, LongSplashModel

__all__ = ["LongSplashConfig", "LongSplashForCausalLM", "LongSplashModel"]
