"""The one door to data sets of the Hugging Face Hub; what goes wrong there becomes a sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def stream(
    path: str, config: str | None, split: str, revision: str | None, name: str
) -> Iterator[Mapping[str, Any]]:
    """Yields records (column -> value), streamed; no code of the data set is run.

    Raises ValueError for a data set, configuration or split that is not there (as far as the Hub
    says); ConnectionError when the Hub cannot be reached, also half-way.
    """
    import datasets

    with _sentences(name):
        yield from datasets.load_dataset(
            path, config, split=split, revision=revision, streaming=True
        )


def commit(path: str, revision: str | None, name: str) -> str:
    """The commit, 40 hex digits, that a branch or tag (None: main) names now. Raises as stream."""
    from huggingface_hub import HfApi

    with _sentences(name):
        return str(HfApi().dataset_info(path, revision=revision).sha)


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        told = isinstance(error, DatasetNotFoundError)  # the others begin with an HTTP status
        said = first_line(error) if told else "the Hub has no such data set or revision for you"
        raise ValueError(
            f"data set {name}: {said}: correct path and revision, accept "
            "its terms on the Hub and log in (hf auth login), or use data.sources.Local"
        ) from None
    except (OSError, httpx.HTTPError) as error:
        raise ConnectionError(
            f"data set {name} cannot be read from the Hub ({first_line(error)}): check "
            "the network, HF_ENDPOINT and your token, or use data.sources.Local"
        ) from None
    except ValueError as error:  # no such configuration or split: datasets lists those it has
        raise ValueError(f"data set {name}: {first_line(error)}: correct name or split") from None


def first_line(error: Exception) -> str:
    """What the error says first, without its full stop; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
