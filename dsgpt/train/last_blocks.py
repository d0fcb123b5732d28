"""How many of the last blocks to train, where the config says auto: by the size of the new data and its likeness to the old.

The brief's rule, as it is known from images (Yosinski et al. 2014; Stanford CS231n, "Transfer Learning", the four cases):

                            like the model's own     unlike
    few tokens              the last block           a quarter of the blocks
    many tokens             half of the blocks       all blocks

*Many* are more tokens than one block has parameters. *Unlike* is text on which the untouched model loses over 15 % more nats
a token than on general text, where a second validation set holds some; without one, the measure is not known and the data
counts as unlike. Torch-free; what is measured comes in as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsgpt.planning import block_parameters
from dsgpt.train.resolve import ResolvedRun
from dsgpt.units import format_count

UNLIKE = 1.15
GENERAL = "general"


@dataclass(frozen=True)
class Choice:
    """`num_last_blocks` and what it follows from; losses in nats per token, None where not measured."""

    num_last_blocks: int
    num_blocks: int
    tokens: int
    block_parameters: int
    domain_loss: float | None
    general_loss: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def text(self) -> str:
        many = "more" if self.tokens > self.block_parameters else "fewer"
        if self.domain_loss is None or self.general_loss is None:
            like = "no second validation set says how it compares with general text, so it counts as unlike"
        else:
            ratio = self.domain_loss / self.general_loss
            like = (
                f"the untouched model loses {self.domain_loss:.3f} nats a token there and {self.general_loss:.3f} on general "
                f"text, {ratio:.2f} x, {'un' if ratio > UNLIKE else ''}like (limit {UNLIKE})"
            )
        return (
            f"num_last_blocks = {self.num_last_blocks} of {self.num_blocks}: {format_count(self.tokens)} tokens of training "
            f"data, {many} than the {format_count(self.block_parameters)} parameters of a block; {like}"
        )


def choose(run: ResolvedRun, losses: Mapping[str, float]) -> Choice:
    """`losses` of the untouched model by validation set: one called general, or the second, is general text."""
    tokens = sum(source.num_samples for source in run.data.train) * run.config.training.seq_length
    names = list(losses)
    general = GENERAL if GENERAL in names else names[1] if len(names) > 1 else None
    domain = next((name for name in names if name != general), None)
    domain_loss, general_loss = (None if name is None else losses[name] for name in (domain, general))
    unlike = domain_loss is None or general_loss is None or domain_loss > UNLIKE * general_loss
    block, blocks = block_parameters(run.model), run.model.num_hidden_layers
    few = 1 if not unlike else round(blocks / 4)
    many = round(blocks / 2) if not unlike else blocks
    number = many if tokens > block else few
    return Choice(max(1, number), blocks, tokens, block, domain_loss, general_loss)
