"""The sequence of visited sub-networks: exact proportions, even shares, and a state that resumes."""

import json
from itertools import islice

import numpy as np
import pytest

from flextron.ranking.sensitivity import Sensitivity
from flextron.subnet import AXES
from flextron.training.sampling import KINDS, SubnetSampler, Visit, even_sensitivity


def sampler(sensitivity: Sensitivity, smallest: float = 0.5, **options) -> SubnetSampler:
    return SubnetSampler([sensitivity], smallest=sensitivity.allocate(smallest), **options)


def take(sampler: SubnetSampler, count: int) -> list[Visit]:
    return [sampler.next() for _ in range(count)]


def randoms(sampler: SubnetSampler):
    """Yield the target share and sub-network of each random visit, forever."""
    while True:
        visit = sampler.next()
        if visit.kind == "random":
            lowest = sampler._lowest_share
            yield lowest + (1 - lowest) * sampler.state_dict()["place"], visit.subnet


class TestKinds:
    @pytest.mark.parametrize("weights", [(1, 1, 0, 2), (1, 1, 1, 1), (0, 0, 0, 1), (5, 0.3, 0.7, 2), (1, 10, 0, 100)])
    def test_proportions_hold_at_any_length(self, sensitivity, weights):
        presets = [sensitivity.allocate(0.7)] if weights[2] else []
        counts = dict.fromkeys(KINDS, 0)
        for number, visit in enumerate(take(sampler(sensitivity, weights=weights, presets=presets), 230), start=1):
            counts[visit.kind] += 1
            wanted = [weight / sum(weights) * number for weight in weights]
            assert all(abs(found - share) < 1 for found, share in zip(counts.values(), wanted, strict=True)), number

    def test_each_kind_is_what_it_says(self, sensitivity):
        presets = [sensitivity.allocate(share) for share in (0.6, 0.7, 0.8)]
        visits = take(sampler(sensitivity, weights=(1, 1, 1, 1), presets=presets), 48)
        found = {kind: [visit.subnet for visit in visits if visit.kind == kind] for kind in KINDS}
        assert set(found["full"]) == {sensitivity.search_space.full}
        assert set(found["smallest"]) == {sensitivity.allocate(0.5)}
        assert found["preset"] == presets * 4  # in turn
        assert len(set(found["random"])) > 10

    def test_a_weight_of_0_is_never_visited(self, sensitivity):
        assert {visit.kind for visit in take(sampler(sensitivity, weights=(0, 3, 0, 0.1)), 100)} == {
            "smallest",
            "random",
        }

    @pytest.mark.parametrize("weights", [(1, 1, 2), (1, 1, 0, 2, 1), (1, -1, 0, 2), (0, 0, 0, 0)])
    def test_weights_that_make_no_sense(self, sensitivity, weights):
        with pytest.raises(ValueError, match=r"visits must be four weights from 0 up, for full, smallest.*; got \["):
            sampler(sensitivity, weights=weights)

    def test_presets_that_are_not_named(self, sensitivity):
        with pytest.raises(
            ValueError, match=r"presets have weight 0\.5, but none is named\. Name presets, or pass weight 0"
        ):
            sampler(sensitivity, weights=(1, 1, 0.5, 1))

    def test_nothing_between_the_smallest_and_the_full_model(self, sensitivity):
        with pytest.raises(ValueError, match="a search space with more than one size"):
            sampler(sensitivity, smallest=1.0)


class TestRandom:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("smallest", [0.3, 0.6])
    def test_shares_are_even_between_the_smallest_and_the_full_model(self, sensitivity, smallest, seed):
        draws = list(islice(randoms(sampler(sensitivity, smallest, weights=(0, 0, 0, 1), seed=seed)), 200))
        lowest = sensitivity.share(sensitivity.allocate(smallest))
        places = (np.array([target for target, _ in draws]) - lowest) / (1 - lowest)
        counts, _ = np.histogram(places, bins=10, range=(0, 1))
        assert counts.sum() == 200
        assert np.abs(counts - 20).max() <= 2
        first, _ = np.histogram(places[:10], bins=5, range=(0, 1))  # a short run covers it too
        assert first.min() >= 1
        shares = np.array([sensitivity.share(subnet) for _, subnet in draws])
        assert abs(shares.mean() - (1 + lowest) / 2) < 0.04
        assert np.std(shares) == pytest.approx((1 - lowest) / 12**0.5, rel=0.15)

    def test_no_larger_than_asked_and_hardly_smaller(self, sensitivity):
        total = sensitivity._weights(sensitivity.search_space.full)
        step = max(
            unit * max(np.diff(getattr(sensitivity.search_space, axis)))
            for axis in AXES
            for unit in sensitivity.unit_weights[axis]
        )
        for target, subnet in islice(randoms(sampler(sensitivity)), 100):
            sensitivity.search_space.check(subnet)
            assert target - step / total < sensitivity.share(subnet) <= target

    def test_spread_0_is_the_greedy_choice(self, sensitivity):
        for target, subnet in islice(randoms(sampler(sensitivity, spread=0)), 50):
            assert subnet == sensitivity.allocate(target)

    def test_several_sensitivities_take_turns(self, sensitivity, llama):
        """Random shares start at the smallest sub-network, whatever other kinds do in between."""
        both = [sensitivity, even_sensitivity(llama)]
        smallest = both[1].allocate(0.4)
        for weights in ((0, 0, 0, 1), (1, 1, 0, 2)):
            run = SubnetSampler(both, smallest=smallest, spread=0, weights=weights)
            for number, (target, subnet) in enumerate(islice(randoms(run), 40)):
                assert subnet == both[number % 2].allocate(target)

    def test_spread_leaves_the_greedy_choice_layer_by_layer(self, sensitivity):
        """More spread gives more distance, in every layer and axis and in both directions."""

        def differences(spread):
            found = [
                [np.subtract(getattr(subnet, axis), getattr(sensitivity.allocate(target), axis)) for axis in AXES]
                for target, subnet in islice(randoms(sampler(sensitivity, 0.3, spread=spread)), 100)
            ]
            return np.array(found)  # [100, axes, layers]

        near, far = differences(0.2), differences(1.0)
        assert 0 < np.abs(near).mean() < np.abs(far).mean()
        assert (far > 0).any(0).all()
        assert (far < 0).any(0).all()

    def test_neurons_of_one_layer_take_many_widths(self, sensitivity):
        widths = np.array([subnet.neurons for _, subnet in islice(randoms(sampler(sensitivity, 0.3)), 200)])
        choices = len(sensitivity.search_space.neurons)
        assert all(len(set(of_layer)) > choices / 2 for of_layer in widths.T)


class TestSequence:
    def test_the_seed_alone_decides(self, sensitivity):
        one, same, other = (take(sampler(sensitivity, seed=seed), 40) for seed in (1, 1, 2))
        assert one == same
        assert one != other

    @pytest.mark.parametrize("before", [0, 1, 7, 30])
    def test_goes_on_from_its_state(self, sensitivity, before):
        options = {"weights": (1, 1, 1, 2), "presets": [sensitivity.allocate(share) for share in (0.6, 0.8)]}
        run = sampler(sensitivity, **options, seed=5)
        take(run, before)
        state = json.loads(json.dumps(run.state_dict()))
        expected = take(run, 40)
        other = sampler(sensitivity, **options, seed=6)
        take(other, 3)
        other.load_state_dict(state)
        assert take(other, 40) == expected

    def test_a_state_stays_as_it_was_taken(self, sensitivity):
        run = sampler(sensitivity)
        take(run, 3)
        state = run.state_dict()
        expected = json.dumps(state)
        take(run, 5)
        assert json.dumps(state) == expected


class TestEvenSensitivity:
    def test_equal_widths_in_all_layers(self, llama):
        found = even_sensitivity(llama)
        space = llama.search_space
        for share in (0.3, 0.5, 0.7, 0.9):
            subnet = found.allocate(share)
            space.check(subnet)
            assert share - 0.08 < llama.share(subnet) <= share  # a KV group of one layer is 8% here
            assert max(subnet.kv_groups) - min(subnet.kv_groups) <= 1
            assert max(subnet.neurons) - min(subnet.neurons) <= 4 * (space.neurons[1] - space.neurons[0])

    def test_more_of_attention_is_kept_than_of_the_mlp(self, llama):
        full = llama.search_space.full
        for share in (0.5, 0.7, 0.9):
            subnet = even_sensitivity(llama).allocate(share)
            neurons, kv_groups = (sum(getattr(subnet, axis)) / sum(getattr(full, axis)) for axis in AXES)
            assert 0 < neurons < kv_groups

    def test_shares_are_those_of_the_model(self, llama):
        found = even_sensitivity(llama)
        subnet = found.allocate(0.6)
        assert found.share(subnet) == pytest.approx(llama.share(subnet))
