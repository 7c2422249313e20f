"""Pages: beginnings are shared within a level, what is held is never taken, and all comes back."""

import random

import pytest
import torch

from flextron.serving.embedded.pages import Held, NoPagesError, PagedCache, PagePool

PAGE = 4


def fill(pool: PagePool, prompt, level: int) -> Held:
    """Hold and write a whole prompt, as a request that reads it does."""
    held = pool.match(prompt, level)
    new = prompt[len(held.tokens) :]
    pool.extend(held, len(new))
    pool.written(held, new, level)
    return held


class TestSharing:
    def test_whole_pages_of_one_level_are_shared_and_a_token_is_left_to_run(self):
        pool = PagePool(16, PAGE)
        prompt = list(range(8))
        first = fill(pool, prompt, 2)
        assert pool.match(prompt, 2).pages == first.pages[:1]  # the last page would leave nothing to run
        assert pool.match([*prompt, 99], 2).pages == first.pages
        assert pool.match([*prompt, 99], 1).pages == []
        assert pool.match([1, *prompt], 2).pages == []

    def test_pages_outlive_their_request_until_room_is_needed(self):
        pool = PagePool(4, PAGE)
        pool.release(fill(pool, list(range(9)), 0))
        assert pool.held == 0
        kept = pool.match(list(range(9)), 0)
        assert len(kept.pages) == 2
        pool.release(kept)
        pool.release(fill(pool, list(range(100, 116)), 0))
        assert pool.match(list(range(9)), 0).pages == []

    def test_a_text_that_changed_its_level_publishes_no_more(self):
        pool = PagePool(8, PAGE)
        held = pool.match(list(range(12)), 1)
        pool.extend(held, 12)
        pool.written(held, [0, 1, 2, 3], 1)
        pool.written(held, [4, 5, 6, 7, 8, 9, 10, 11], 0)
        assert [len(pool.match([*range(12), 99], level).pages) for level in (0, 1)] == [0, 1]

    def test_texts_that_grow_side_by_side_keep_their_pages_together(self):
        pool = PagePool(64, PAGE)
        texts = [pool.match([i], 0) for i in range(4)]
        for _ in range(8):
            for held in texts:
                pool.extend(held, PAGE)
                pool.written(held, [1] * PAGE, 0)
        for held in texts:
            assert held.pages == list(range(held.pages[0], held.pages[0] + 8))

    def test_nothing_is_taken_where_there_is_too_little(self):
        pool = PagePool(3, PAGE)
        held = fill(pool, list(range(8)), 0)
        with pytest.raises(NoPagesError, match="2 pages are needed, 1 are free"):
            pool.extend(held, 8)
        assert (len(held.pages), pool.available) == (2, 1)

    @pytest.mark.parametrize("seed", range(5))
    def test_random_lives_never_mix_texts(self, seed):
        """Each page that a text holds has that text's tokens, at that text's level, whatever came and went."""
        draw, pool, contents, alive = random.Random(seed), PagePool(24, PAGE), {}, []  # noqa: S311
        for _ in range(300):
            if alive and draw.random() < 0.4:
                pool.release(alive.pop(draw.randrange(len(alive)))[0])
                continue
            prompt, level = [draw.randint(0, 1) for _ in range(draw.randint(1, 20))], draw.randint(0, 1)
            held = pool.match(prompt, level)
            for place, page in enumerate(held.pages):
                assert contents[page] == (level, prompt[: (place + 1) * PAGE])
            new = prompt[len(held.tokens) :]
            if pool.missing(held, len(new)) > pool.available:
                pool.release(held)
                continue
            before = len(held.pages)
            pool.extend(held, len(new))
            pool.written(held, new, level)
            for place in range(before, len(held.pages)):
                contents[held.pages[place]] = (level, prompt[: (place + 1) * PAGE])
            alive.append((held, prompt))
            owners = [page for other, _ in alive for page in other.pages]
            assert pool.held == len(set(owners))
        for held, _ in alive:
            pool.release(held)
        assert (pool.held, pool.available) == (0, 24)


class TestCache:
    def test_what_is_written_is_read_adjoining_or_not(self):
        pool = PagePool(6, PAGE)
        cache = PagedCache(pool)
        texts = [Held(None), Held(None)]
        rows = torch.randn(2, 10, 3, 5)
        for token in range(10):  # in turn, so that their pages alternate
            for held, states in zip(texts, rows, strict=True):
                pool.extend(held, 1)
                slots = torch.tensor(list(cache.slots(held, token, 1)))
                cache.write(0, slots, states[token : token + 1], -states[token : token + 1], full=3)
                pool.written(held, [7], 0)
        for held, states in zip(texts, rows, strict=True):
            keys, values = cache.read(0, cache.pages([held], 9), 9, groups=2)
            assert torch.equal(keys[0], states[:9, :2])
            assert torch.equal(values[0], -states[:9, :2])
        keys, _ = cache.read(0, cache.pages(texts, 10), 10, groups=3)
        assert torch.equal(keys, rows)

    def test_fewer_groups_leave_the_others_alone(self):
        pool = PagePool(2, PAGE)
        cache, held = PagedCache(pool), Held(None)
        pool.extend(held, 4)
        slots = torch.tensor(list(cache.slots(held, 0, 4)))
        cache.write(0, slots, torch.ones(4, 3, 2), torch.ones(4, 3, 2), full=3)
        cache.write(0, slots, torch.zeros(4, 1, 2), torch.zeros(4, 1, 2), full=3)
        keys, _ = cache.read(0, cache.pages([held], 4), 4, groups=3)
        assert keys[0, :, 0].sum() == 0
        assert keys[0, :, 1:].eq(1).all()
