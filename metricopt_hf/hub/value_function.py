"""ValueFunction: a value network with its signature and observations, saved, loaded and pushed."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from ..errors import ValueFunctionError
from ..phi import Coordinates
from ..value import Signature, Trajectory, ValueNetwork, serialization
from . import cards, client

logger = logging.getLogger(__name__)


class ValueFunction(ValueNetwork):
    """A value network, its signature, and the observations that it was fitted to.

    Its methods have the names of `PyTorchModelHubMixin`, but it is none: the mixin loads any tensors that fit, falls
    back to pickle and never renews a card, while here a stranger's files are checked (`value/serialization.py`).

    Args:
        num_coordinates, hidden_size, num_members: see `ValueNetwork`.

    Attributes:
        signature: the meaning of its inputs z, and the metric; None if it was never part of a run.
        observations: the points and scores that it was fitted to.
    """

    def __init__(self, num_coordinates: int, hidden_size: int = 32, num_members: int = 6):
        super().__init__(num_coordinates, hidden_size, num_members)
        self.signature: Signature | None = None
        self.observations = Trajectory()

    @classmethod
    def of(cls, network: ValueNetwork, signature: Signature | None, observations: Trajectory) -> ValueFunction:
        """A copy of a network, with signature and observations."""
        value_function = cls(network.num_coordinates, network.hidden_size, network.num_members)
        value_function.load_state_dict(network.state_dict())
        value_function.signature, value_function.observations = signature, observations
        return value_function.eval()

    def coordinates_from(self, phi: Tensor) -> Coordinates:
        """The coordinates in which it was learned, on phi's device; it must have a signature.

        Args:
            phi: [d], a start that may lie elsewhere.
        """
        assert (about := self.signature) is not None
        coordinates = Coordinates(about.origin.to(phi.device), about.basis.to(phi.device), about.coordinates)
        if len(self.observations):
            z, known = coordinates.encode(phi).cpu(), self.observations.z
            low, high = known.amin(0), known.amax(0)
            away = float((torch.maximum(low - z, z - high) / (high - low).clamp_min(1e-8)).max())
            if away > 1:
                logger.warning(
                    f"This run starts {away:.1f} times the observed range away from all that the value function given "
                    "has seen, so it has to learn anew: is this the model, and the start, that it was learned on?"
                )
        return coordinates

    def save_pretrained(self, folder: str | os.PathLike, model_card_kwargs: dict[str, Any] | None = None) -> None:
        """Write weights, signature, observations and a card into `folder`.

        Args:
            model_card_kwargs: figures for the card, see `cards.render`. A card that somebody has written stays.
        """
        sizes = {name: getattr(self, name) for name in serialization.MAX_SIZES}
        serialization.write(folder, sizes, self.state_dict(), self.signature, self.observations)
        cards.write(os.path.join(folder, serialization.CARD_FILE), self, **(model_card_kwargs or {}))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> ValueFunction:
        """Read a value function from a folder or from the Hub. No code is run, and damaged files are refused.

        Args:
            name_or_path: its folder or repository, or that of a model which was pushed together with it.
            revision: branch, tag or commit.
            token: for private repositories; default: the one that `hf auth login` stored, or HF_TOKEN.
            cache_dir, local_files_only: as for all downloads from the Hub.

        Raises:
            ValueFunctionError: it is damaged or cannot be loaded; the message says why, and what to do.
        """
        folder = client.fetch(name_or_path, revision, token, cache_dir, local_files_only)
        sizes, state, signature, observations = serialization.read(folder, str(name_or_path))
        value_function = cls(**sizes)
        value_function.load_state_dict(state)
        points = observations.z[-64:] if len(observations) else value_function.z_mean
        answers = (*value_function.predict(points), value_function.gradient(points))
        if not all(answer.isfinite().all() for answer in answers):  # finite weights can overflow
            raise ValueFunctionError(
                f"{name_or_path} predicts numbers that are not finite where it was learned. {serialization.REMEDY}"
            )
        value_function.signature, value_function.observations = signature, observations
        return value_function.eval()

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Value function",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Push to a repository of its own, which is made where there is none. Returns the URL of the commit.

        Raises:
            HubError: why it failed, and what to do.
        """

        def upload():
            api = HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self.save_pretrained(folder, {"repo": name, **(model_card_kwargs or {})})
            message = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
            return api.upload_folder(repo_id=name, folder_path=folder, **message)

        with tempfile.TemporaryDirectory() as folder:
            return client.push(upload, repo_id, "the value function is as it was; save_pretrained(folder) keeps it")
