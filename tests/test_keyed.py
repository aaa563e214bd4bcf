"""Keyed randomness: the same bits everywhere, independent streams, no global state."""

import zlib

import torch

from datasets.keyed import generator, hash64, sample_keys, uniform


def test_hash64_is_splitmix64():
    def finalise(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    expected = finalise((finalise((7 + 0x9E3779B97F4A7C15) % 2**64) + 2**64 - 3 + 0x9E3779B97F4A7C15) % 2**64)
    assert int(hash64(7, -3)) % 2**64 == expected


def test_hash64_broadcasts_and_accepts_numbers_of_any_size():
    assert hash64(1, torch.arange(3).view(3, 1), torch.arange(4)).shape == (3, 4)
    assert int(hash64(2**63)) == int(hash64(-(2**63)))
    assert int(hash64(1, 2)) != int(hash64(2, 1))
    assert int(hash64(1, "queue")) == int(hash64(1, zlib.crc32(b"queue"))), "unlike hash(), the same in every process"


def test_uniform_is_uniform_and_streams_are_independent():
    keys = sample_keys(0, 1, torch.arange(20000))
    draws = torch.cat([uniform(keys, 2, "query/crop"), uniform(keys, 2, "key/crop")], dim=1)
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.allclose(draws.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(draws.var(0), torch.tensor(1 / 12), atol=0.002)
    assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 0.03


def test_draws_hang_on_nothing_but_the_key():
    index = torch.arange(50)
    keys = sample_keys(3, 5, index)
    assert torch.equal(uniform(keys, 3, "s")[7:9], uniform(sample_keys(3, 5, index[7:9]), 3, "s"))
    assert len(torch.cat([keys, sample_keys(3, 6, index), sample_keys(4, 5, index)]).unique()) == 150


def test_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first = torch.rand(5, generator=generator("cpu", 1, 2))
    assert torch.equal(first, torch.rand(5, generator=generator("cpu", 1, 2)))
    assert not torch.equal(first, torch.rand(5, generator=generator("cpu", 1, 3)))
    assert torch.equal(before, torch.get_rng_state())
