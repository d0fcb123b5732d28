"""The model that the tests of the verbs use."""

from __future__ import annotations

from tests.chat_folder import model_folder  # noqa: F401
