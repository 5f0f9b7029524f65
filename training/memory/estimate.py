"""The peak of one rank: lasting parts and what each phase adds to them."""

from dataclasses import dataclass, field

from training.memory.activations import (
    attention_output,
    block_activations,
    kept_of_attention,
    norm_activations,
    outside_blocks,
)
from training.memory.dsa import index_workspace, operands
from training.memory.nsa import branch_operands, selection_workspace
from training.memory.setup import FLOAT32, Setup
from training.memory.states import Part, block_matrices, states
from training.memory.teacher import teacher_forward, teacher_weights
from training.memory.workspace import backward_workspace, compiled_backward, loss_workspace


@dataclass
class Estimate:
    """Parts that stay for the whole run or until backward, what each phase adds to their sum (less than nothing where
    it has freed more of them than it needs), and what is on the host."""

    lasting: dict[str, Part] = field(default_factory=dict)
    phases: dict[str, Part] = field(default_factory=dict)
    host: dict[str, Part] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    def during(self, phase: str) -> float:
        """All that is there in a phase."""
        return sum(part.bytes for part in self.lasting.values()) + self.phases[phase].bytes

    @property
    def total(self) -> float:
        return self.during(self.peak_phase)


def estimate(setup: Setup) -> Estimate:
    """The estimate for one rank."""
    lasting, host = states(setup)
    result = Estimate(lasting, host=host)
    kept = block_activations(setup)
    block, block_input = sum(kept.values()), setup.local_tokens * setup.residual_bytes * setup.network.d_model
    layers, mode = setup.network.n_layers, setup.activation_checkpointing
    attention = kept_of_attention(setup)
    per_layer = {"none": block, "offload": attention}.get(mode, block_input + attention)
    outside = outside_blocks(setup)
    if mode == "offload":
        # the last norm's operands too: x, and from the CPU's composite of operations x again and x / rms
        moved = 1 if setup.cuda else 3
        outside -= (moved if setup.cuda else moved - 1) * block_input
        result.host["blocks' inputs (pinned)"] = Part((layers + moved) * block_input, "(L + 1) n C r")
    formula = {"none": "L x one block, ", "offload": ""}.get(mode, "L n C r, ")
    formula += "L x what is kept of attention, " * (mode != "none" and attention > 0)
    result.lasting["activations"] = Part(
        layers * per_layer + outside, f"{formula}n x (last norm, positions, token ids)"
    )
    if setup.teacher is not None:
        weights = teacher_weights(setup.teacher, setup.product_bytes)
        result.lasting["teacher"] = Part(weights, "w bytes of its blocks' matrices, 4 of the rest")
    gradients = 0 if setup.keeps_gradients else result.lasting["gradients"].bytes  # that are still to come
    own = 0 if setup.keeps_gradients else FLOAT32 * sum(block_matrices(setup.network))
    table = FLOAT32 * setup.network.vocab_size * setup.network.d_model
    # the head's gradient: a tied one waits for the embedding's, another is where gradients are
    head = table if setup.network.tie_embeddings else 0
    # a block that is recomputed: its input is there already, or comes back from the host
    again = (0 if mode == "none" else block - per_layer) + backward_workspace(setup)
    if setup.compiled and mode != "none":
        there = (block_input if mode != "offload" else 0) + (attention_output(setup) if mode == "selective" else 0)
        again = max(again, compiled_backward(setup) - there)
    if mode != "offload":
        again -= setup.local_tokens * norm_activations(setup, setup.network.d_model)  # the last norm's are gone
    result.phases = {
        # in the last micro-batch of a step the gradients of the others are there; in the first, those of the last step
        "loss": Part(loss_workspace(setup), "chunk of logits, head in w bytes, gradients of hidden states and head"),
        "backward, last block": Part(
            again - gradients + (table if gradients else head),
            "its activations where recomputed, their gradients, and the head's where it waits",
        ),
        "backward, first block": Part(
            again - (layers - 1) * per_layer - own + (0 if gradients else head),
            "as above; other blocks' activations are gone, its own gradients to come",
        ),
        "backward, embedding": Part(
            block_input + table + (0 if gradients else head) - layers * per_layer,
            "n C r, 4 V C, and the head's gradient",
        ),
    }
    if setup.teacher is not None:
        there = result.lasting["activations"].bytes + gradients
        result.phases["teacher's forward"] = Part(
            teacher_forward(setup, setup.teacher) - there,
            "its residual stream and most of one block, before the student's",
        )
    choosing = _choosing(setup)
    if choosing is not None:
        phase, work, given, formula = choosing
        later = kept["feed-forward"] + kept["attention's output"] + kept["norms"] / 2
        later += kept["attention"] - given  # masks and what attention gives are to come
        # where blocks are recomputed, the last one is so with gradients of the residual stream and the head there
        there = -later if mode == "none" else block - per_layer - later + block_input + head - gradients
        result.phases[phase] = Part(work + there, formula)
    return result


def _choosing(setup: Setup) -> tuple[str, float, float, str] | None:
    """Of attention that chooses keys: the phase, its bytes beside attention's operands, those, and a formula."""
    dsa, nsa = setup.network.attention.dsa, setup.network.attention.nsa
    if dsa is not None:
        formula = "rows x keys: the indexer's scores; on CPUs attention's weights, the indexer's gradients"
        return "indexer's loss", index_workspace(setup, dsa), operands(setup), formula
    if nsa is not None and setup.cuda:
        formula = "rows x blocks: 4 bytes a KV head; 16 bytes for each that is chosen"
        return "selection", selection_workspace(setup, nsa), branch_operands(setup, nsa), formula
    return None
