"""How logits and a keyed number become a token."""

import itertools

import numpy as np
import pytest
import torch
from law import bisect, reference_law
from scipy.stats import kstest

from decoding.sampling import Purpose, Sampling, draw

LARGEST = (2**32 - 1) / 2**32  # the largest number that the hash gives


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_law_is_the_slow_reference(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    logits = 3 * torch.randn(4, 5, 17, generator=torch.Generator().manual_seed(0)).double()
    law = sampling.law(logits)
    assert law.dtype == torch.float32
    np.testing.assert_allclose(law, reference_law(logits, sampling), atol=1e-6)
    assert ((law > 0).sum(-1) >= 1).all()


def test_top_p_reaches_its_mass_with_the_fewest_tokens():
    """By hand, since the reference could share a mistake: 0.5 + 0.3 is the first to reach 0.7."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    law = Sampling(1.0, top_p=0.7).law(logits)
    torch.testing.assert_close(law, torch.tensor([0, 0.625, 0, 0.375]))
    law = Sampling(0.5, top_k=2).law(logits)
    torch.testing.assert_close(law, torch.tensor([0, 0.25 / 0.34, 0, 0.09 / 0.34]))


def test_nucleus_follows_temperature():
    """Temperature first, then the nucleus: the other order keeps other tokens."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    kept = {t: int((Sampling(t, top_p=0.8).law(logits) > 0).sum()) for t in (0.3, 1.0, 3.0)}
    assert kept == {0.3: 1, 1.0: 2, 3.0: 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_returns_the_impossible(dtype):
    """u = 0 with zero mass in front, u near 1 with zero mass behind, and laws of any scale."""
    rng = np.random.default_rng(0)
    law = torch.from_numpy(rng.dirichlet(np.full(64, 0.05), 4_000)).to(dtype)
    law[law < 1e-3] = 0
    law[:, :3] = 0
    law[:, -3:] = 0
    law[:, 30] += 1e-30  # a row must have some mass
    for scale in (1, 1e-20, 1e20):
        for u in (0.0, 2.0**-32, 0.5, LARGEST):
            token = draw(law * scale, torch.full((4_000,), u, dtype=torch.float64))
            assert (law.gather(1, token[:, None]) > 0).all(), (scale, u)


def test_draw_in_a_large_vocabulary():
    """A cumulative sum in fp32 would end below 1 and fall off the end, or miss rare tokens."""
    law = torch.full((1, 150_000), 1 / 150_000)
    u = torch.tensor([LARGEST], dtype=torch.float64)
    assert draw(law, u).item() == 149_999
    assert draw(law, torch.zeros(1, dtype=torch.float64)).item() == 0
    middle = draw(law.expand(99, -1), torch.arange(1, 100, dtype=torch.float64) / 100)
    due = torch.arange(1, 100) * 1_500
    assert (middle - due).abs().max() <= 1


def test_draw_gives_each_token_its_probability():
    """The set of u that gives a token is as long as the token is likely, to 1e-13."""
    law = torch.from_numpy(np.random.default_rng(3).dirichlet(np.full(6, 0.9), 40))
    edges = [torch.zeros(40, dtype=torch.float64)]
    for k in range(1, 6):
        edges.append(bisect(lambda u, k=k: draw(law, u) >= k, 40))
    edges.append(torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(edges, 1).diff(dim=1), law, atol=1e-13, rtol=0)


def test_uniforms_are_uniform_distinct_and_reproducible():
    sampling, requests = Sampling(1.0, seed=7), list(range(40))
    numbers = []
    for purpose, start in itertools.product((Purpose.DRAFT, Purpose.ACCEPT), range(1, 60)):
        u = sampling.uniforms(purpose, requests, [start] * 40, 8)
        assert u.shape == (40, 8)
        assert u.dtype == torch.float64
        numbers.append(u.flatten())
    places = torch.arange(1, 60).expand(40, -1)
    numbers.append(sampling.uniforms_at(requests, places).flatten())
    every = torch.cat(numbers).numpy()
    assert every.min() >= 0
    assert every.max() < 1
    assert kstest(every, "uniform").pvalue > 1e-4
    # of n numbers of 32 bits about n^2 / 2^33 coincide by chance; a shared key gives thousands
    assert len(every) - len(np.unique(every)) < 10
    again = sampling.uniforms(Purpose.DRAFT, requests, [1] * 40, 8)
    assert torch.equal(again.flatten(), numbers[0])
    other = Sampling(1.0, seed=8).uniforms(Purpose.DRAFT, requests, [1] * 40, 8)
    assert not torch.equal(other, again)


@pytest.mark.parametrize("lag", ["request", "start", "offset"])
def test_neighbouring_keys_are_uncorrelated(lag):
    sampling = Sampling(1.0)
    requests, starts = np.meshgrid(np.arange(300), np.arange(1, 40), indexing="ij")
    u = sampling.uniforms(Purpose.ACCEPT, requests.ravel().tolist(), starts.ravel().tolist(), 4)
    u = u.reshape(300, 39, 4).numpy()
    axis = ["request", "start", "offset"].index(lag)
    a = np.take(u, range(u.shape[axis] - 1), axis).ravel()
    b = np.take(u, range(1, u.shape[axis]), axis).ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_a_row_does_not_see_the_others():
    sampling = Sampling(1.0)
    together = sampling.uniforms(Purpose.DRAFT, [4, 9, 2], [7, 3, 7], 5)
    alone = sampling.uniforms(Purpose.DRAFT, [9], [3], 5)
    assert torch.equal(together[1:2], alone)
    longer = sampling.uniforms(Purpose.DRAFT, [9], [3], 9)
    assert torch.equal(longer[:, :5], alone)
    at = sampling.uniforms_at([4, 9], torch.tensor([[1, 2], [5, 6]]))
    assert torch.equal(at[1:], sampling.uniforms_at([9], torch.tensor([[5, 6]])))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)
