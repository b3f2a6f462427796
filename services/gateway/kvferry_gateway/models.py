"""The models that one gateway serves, and which of them a request means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvferry_gateway.errors import model_not_found, model_not_named
from kvferry_gateway.requests.prompt import Prompter


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the gateway has of a model: all that makes tokens of requests, and text of tokens."""

    name: str
    prompter: Prompter
    max_context: int  # the model's own limit in tokens, for as long as no worker has told its
    vocabulary_id: str  # of its tokenizer, see `kvferry.text.vocabulary`


class Models:
    """By name, at least one. Workers of other models may be in the cluster; no request goes to them."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.name: model for model in models}
        assert self._models, "a gateway serves something"

    def __iter__(self) -> Iterator[ServedModel]:
        """In the order in which they were given."""
        return iter(self._models.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._models)

    def named(self, name: str) -> ServedModel:
        """Raises `ApiError` 404."""
        model = self._models.get(name)
        if model is None:
            raise model_not_found(name)
        return model

    def asked_for(self, name: str | None) -> ServedModel:
        """None, that is no name, means the only model. Raises `ApiError` 400 or 404."""
        if name is not None:
            return self.named(name)
        if len(self._models) > 1:
            raise model_not_named(self.names)
        return next(iter(self))

    def close(self) -> None:
        for model in self:
            model.prompter.close()
