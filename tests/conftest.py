"""Without a GPU, Triton's kernels are interpreted; Triton reads the switch when it is first imported. What tests verify
is noted apart from what the user's runs do."""

import os
import shutil
import tempfile

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["LONGSPLASH_CACHE"] = os.path.join(tempfile.gettempdir(), "longsplash-tests")
