"""The one door to data sets of the Hugging Face Hub; what goes wrong there becomes a sentence."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from data.secrets import redacted
from drafters.patience import may_pass

TRIES = 5  # of a read that fails, before it is given up; a row that arrives makes them five again
PAUSE = 1.0  # seconds before the second try, doubled before each later one


def stream(
    path: str, config: str | None, split: str, revision: str | None, name: str
) -> Iterator[Mapping[str, Any]]:
    """Yields records (column -> value), streamed; no code of the data set is run.

    When the network or the Hub fails half-way, the stream is opened again behind the last record:
    none is given twice or left out. Raises ValueError for a data set, configuration or split that
    is not there (as far as the Hub says); ConnectionError when it still fails after TRIES tries.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    definite = (DatasetsError, RuntimeError)  # what datasets itself refuses
    state, failed = None, 0
    with _sentences(name):
        while True:
            try:
                rows = datasets.load_dataset(
                    path, config, split=split, revision=revision, streaming=True
                )
                if state is not None:
                    rows.load_state_dict(state)
                for record in rows:
                    state, failed = rows.state_dict(), 0
                    yield record
                return
            except Exception as error:
                failed += 1
                if failed == TRIES or isinstance(error, definite) or not may_pass(error):
                    raise
                time.sleep(PAUSE * 2 ** (failed - 1))


def commit(path: str, revision: str | None, name: str) -> str:
    """The commit, 40 hex digits, that a branch or tag (None: main) names now. Raises as stream."""
    from huggingface_hub import HfApi

    with _sentences(name):
        return str(HfApi().dataset_info(path, revision=revision).sha)


@contextmanager
def _sentences(name: str) -> Iterator[None]:
    import httpx2
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
    except (OSError, httpx2.HTTPError) as error:
        raise ConnectionError(
            f"data set {name} cannot be read from the Hub ({first_line(error)}): check "
            "the network, HF_ENDPOINT and your token, or use data.sources.Local"
        ) from None
    except ValueError as error:  # no such configuration or split: datasets lists those it has
        raise ValueError(f"data set {name}: {first_line(error)}: correct name or split") from None


def first_line(error: Exception) -> str:
    """What the error says first, without its full stop and without secrets; its type if it says
    nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(lines[0].rstrip(".:"))
