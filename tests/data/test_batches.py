from itertools import chain

import pytest
import torch

from unet_diffusion.data import ImageBatches, ImageSet, OrderedBatches, ShuffledBatches

N = 100


def shuffled(epoch=0, *, indices=None, batch_size=8, **options):
    sampler = ShuffledBatches(torch.arange(N) if indices is None else indices, batch_size, num_images=N, **options)
    sampler.set_epoch(epoch)
    return sampler


def test_order_is_a_function_of_seed_and_epoch():
    first = list(shuffled(3, seed=1, horizontal_flip=True))
    torch.manual_seed(5)  # the global generator has no part in it
    assert list(shuffled(3, seed=1, horizontal_flip=True)) == first
    assert list(shuffled(4, seed=1, horizontal_flip=True)) != first
    assert list(shuffled(3, seed=2, horizontal_flip=True)) != first


def test_order_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    list(shuffled(horizontal_flip=True))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_mirroring_does_not_change_the_order():
    plain = torch.tensor(list(shuffled(batch_size=10)))
    mirrored = torch.tensor(list(shuffled(batch_size=10, horizontal_flip=True)))
    assert torch.equal(mirrored % N, plain)
    assert 20 < (mirrored >= N).sum() < 80  # binomial(100, 1/2), six standard deviations


def test_last_incomplete_batch_is_dropped_and_nothing_is_repeated():
    batches = list(shuffled(batch_size=8))
    drawn = list(chain(*batches))
    assert [len(batch) for batch in batches] == [8] * 12
    assert len(set(drawn)) == 96
    assert len(shuffled(batch_size=8)) == 12


def test_two_ranks_see_what_one_sees_with_twice_the_batch():
    ranks = [list(shuffled(2, batch_size=10, num_replicas=2, rank=rank)) for rank in range(2)]
    whole = list(shuffled(2, batch_size=20))
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    first, second = (set(chain(*batches)) for batches in ranks)
    assert not first & second
    assert first | second == set(range(N))


def test_set_smaller_than_a_batch_makes_one_smaller_batch():
    (batch,) = shuffled(batch_size=64, indices=torch.arange(10, 17))
    assert sorted(batch) == list(range(10, 17))


def test_set_smaller_than_a_batch_is_shared_out_evenly():
    ranks = [list(shuffled(batch_size=64, indices=torch.arange(7), num_replicas=2, rank=rank)) for rank in range(2)]
    (first,), (second,) = ranks
    assert len(first) == len(second) == 3
    assert not set(first) & set(second)


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(ValueError, match="each of 4 processes, got 3"):
        shuffled(indices=torch.arange(3), num_replicas=4)
    with pytest.raises(ValueError, match="num_val must be at least the number of processes, 4, got 3"):
        OrderedBatches(torch.arange(3), 8, num_replicas=4)


def test_resumed_epoch_goes_on_where_it_stopped():
    whole = list(shuffled(3))
    resumed = shuffled(3)
    resumed.resume_at(3, 5)
    assert list(resumed) == whole[5:]
    assert len(resumed) == len(whole)  # Lightning counts the batches of a whole epoch
    resumed.set_epoch(4)
    assert list(resumed) == list(shuffled(4))


@pytest.mark.parametrize("num_images", [4, 9, 10, 64, 65])
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_validation_covers_each_image_once_in_as_many_batches_on_every_rank(num_images, num_replicas, batch_size):
    indices = torch.arange(num_images) * 2
    ranks = [list(OrderedBatches(indices, batch_size, num_replicas=num_replicas, rank=r)) for r in range(num_replicas)]
    assert sorted(chain(*chain(*ranks))) == indices.tolist()
    assert len({len(batches) for batches in ranks}) == 1
    largest = max(len(batch) for batches in ranks for batch in batches)
    assert largest <= batch_size or (batch_size == 1 and largest == 2)


def test_validation_is_in_order():
    assert list(chain(*OrderedBatches(torch.tensor([1, 5, 6, 9, 20]), 2))) == [1, 5, 6, 9, 20]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_index_beyond_the_set_is_the_mirrored_image(dtype):
    images = torch.arange(5 * 2 * 3 * 4).view(5, 2, 3, 4).to(dtype)
    batch = ImageBatches(ImageSet(images, {"labels": torch.arange(5) * 10}, list("abcde")))[[3, 5 + 1, 0]]
    assert batch["index"].tolist() == [3, 1, 0]
    assert batch["labels"].tolist() == [30, 10, 0]
    expected = torch.stack([images[3].int(), images[1].int().flip(-1), images[0].int()])
    assert torch.equal(batch["images"].int(), expected)
    assert torch.equal(images.int().flatten(), torch.arange(120))  # the set itself is not mirrored
