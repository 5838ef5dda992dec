"""The private hooks of `transformers.Trainer` that this library overrides or calls, each with the reason.

They are private, so any release may drop or change them, and an override that nobody calls fails in silence. `changed`
names those that differ from what is expected here; the tests ask it of the release that is installed.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

from transformers import Seq2SeqTrainer, Trainer

# As in setup.py: the releases that have these hooks. An attempt with a new one begins here.
TRANSFORMERS = ">=5.20,<6"


class Hook(NamedTuple):
    """A method of Trainer: the names of its parameters, without self, and what it is needed for."""

    parameters: tuple[str, ...]
    why: str


OVERRIDDEN = {
    "_prepare_for_training": Hook(
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "a run's parts are made before the optimizer and the wrappers are",
    ),
    "_save": Hook(("output_dir", "state_dict"), "the value function is saved beside the model"),
    "_save_checkpoint": Hook(("model", "trial"), "a checkpoint holds the guidance's state too"),
    "_load_from_checkpoint": Hook(
        ("resume_from_checkpoint", "model"), "a checkpoint that cannot be read is an error that says what to do"
    ),
    "_load_optimizer_and_scheduler": Hook(
        ("checkpoint",), "the guidance's state is loaded when optimizer and schedule are, once the model is prepared"
    ),
    "_push_from_checkpoint": Hook(("checkpoint_folder",), "what is pushed along the way has a card"),
    "_finish_current_push": Hook((), "a push in the background that failed is reported"),
}
CALLED = {
    "_get_output_dir": Hook(("trial",), "where the checkpoint goes that the guidance's state belongs to"),
    "_prepare_input": Hook(("data",), "the inputs that a metric asks for are on the model's device"),
    "_prepare_inputs": Hook(("inputs",), "the same for the batches that give the coordinates"),
    "_remove_unused_columns": Hook(
        ("dataset", "description"), "the model sees the columns it takes, as in training"
    ),
    "_get_collator_with_removed_columns": Hook(
        ("data_collator", "description"), "the same where the data set has no columns to remove"
    ),
}
# What Trainer and Seq2SeqTrainer set on themselves, and do not document.
ATTRIBUTES = {
    "current_gradient_accumulation_steps": "how many batches an update has, the last of an epoch included",
    "model_accepts_loss_kwargs": "whether the model divides its loss by the items of the whole update",
    "push_in_progress": "the push in the background, to see whether it failed",
    "_gen_kwargs": "how Seq2SeqTrainer generates; an observation may come before its first evaluation",
}


def changed(trainer: type[Trainer] = Seq2SeqTrainer) -> list[str]:
    """A line for each hook that is not as expected in the release of `trainer`, with what it is needed for."""
    source = "\n".join(inspect.getsource(cls) for cls in (Trainer, Seq2SeqTrainer))
    found = []
    for name, hook in (OVERRIDDEN | CALLED).items():
        method = getattr(trainer, name, None)
        if method is None:
            found.append(f"{name} is gone ({hook.why})")
            continue
        parameters = tuple(inspect.signature(method).parameters)[1:]
        if parameters != hook.parameters:
            found.append(f"{name} takes {parameters} instead of {hook.parameters} ({hook.why})")
        elif name in OVERRIDDEN and f"self.{name}(" not in source:
            found.append(f"{name} is not called any more ({hook.why})")
    for name, why in ATTRIBUTES.items():
        if f"self.{name} = " not in source:
            found.append(f"{name} is not set any more ({why})")
    return found
