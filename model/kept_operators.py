"""What is worth keeping of a block whose activations are computed again: operators, as torch's selective checkpointing
takes them."""

from typing import Any

from kernels.alpha_entmax.blockwise import entmax_attention_blockwise
from kernels.alpha_entmax.operator import sum_operator, thresholds_operator
from kernels.block_bias.operator import attention_operator as block_bias_operator
from kernels.lightning_indexer.chosen_launches import attention_operator as chosen_attention_operator
from kernels.selected_blocks.operator import attention_operator as selected_blocks_operator
from model.softmax import SOFTMAX_OPERATORS

# with their results the sum over few keys is left of entmax attention; the PyTorch path has no such operator
THRESHOLDS: tuple[Any, ...] = (thresholds_operator._opoverload,)
ATTENTION: tuple[Any, ...] = (
    *THRESHOLDS,
    sum_operator._opoverload,
    entmax_attention_blockwise._opoverload,
    block_bias_operator._opoverload,
    selected_blocks_operator._opoverload,
    chosen_attention_operator._opoverload,
    *SOFTMAX_OPERATORS,
)
