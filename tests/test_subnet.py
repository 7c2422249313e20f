"""`Subnet` and `SearchSpace`: what they hold, what they refuse, and what they say then."""

import json
import subprocess
import sys

import pytest

from flextron.errors import FlextronError, SubnetError
from flextron.subnet import SearchSpace, Subnet

SPACE = SearchSpace(3, (0, 16, 32, 48), (0, 1, 2))


def text(**changes) -> str:
    return json.dumps({"version": 1, "neurons": [8, 4], "kv_groups": [2, 0], **changes})


class TestSubnet:
    def test_takes_lists_and_hashes(self):
        subnet = Subnet([8, 4], [2, 0])
        assert subnet == Subnet((8, 4), (2, 0))
        assert hash(subnet) == hash(Subnet((8, 4), (2, 0)))
        assert subnet.layers == 2

    @pytest.mark.parametrize(
        ("subnet", "uniform", "said"),
        [
            (Subnet((8, 8), (2, 2)), True, "2 layers of 8 neurons, 2 KV groups"),
            (Subnet((8, 4), (2, 2)), False, "2 layers of 4 to 8 neurons, 2 to 2 KV groups"),
            (Subnet((8, 8), (2, 0)), False, "2 layers of 8 to 8 neurons, 0 to 2 KV groups"),
        ],
    )
    def test_says_what_it_is(self, subnet, uniform, said):
        assert subnet.is_uniform is uniform
        assert str(subnet) == said

    @pytest.mark.parametrize(
        ("neurons", "kv_groups", "message"),
        [
            (8, (1,), "neurons must be one whole number per layer, not 8."),
            ("88", (1, 1), "neurons must be one whole number per layer, not '88'."),
            ((8,), {1: 2}, "kv_groups must be one whole number per layer, not {1: 2}."),
            ((8, -1), (1, 1), "neurons[1] is -1; a width is a whole number from 0 up."),
            ((8, 8), (1, 0.5), "kv_groups[1] is 0.5; a width is a whole number from 0 up."),
            ((True,), (1,), "neurons[0] is True; a width is a whole number from 0 up."),
            ((None,), (1,), "neurons[0] is None; a width is a whole number from 0 up."),
            (
                (8, 8, 8),
                (1, 1),
                "a Subnet needs one width per layer on both axes; got 3 widths of neurons and 2 of kv_groups.",
            ),
            ((), (), "a Subnet needs one width per layer on both axes; got 0 widths of neurons and 0 of kv_groups."),
        ],
    )
    def test_refuses(self, neurons, kv_groups, message):
        with pytest.raises(SubnetError) as error:
            Subnet(neurons, kv_groups)
        assert str(error.value) == message

    def test_an_error_is_a_value_error_and_ours(self):
        assert issubclass(SubnetError, ValueError)
        assert issubclass(SubnetError, FlextronError)


class TestJson:
    def test_round_trip(self):
        subnet = Subnet((8, 0), (2, 1))
        assert Subnet.from_json(subnet.to_json()) == subnet
        assert json.loads(subnet.to_json()) == {"version": 1, "neurons": [8, 0], "kv_groups": [2, 1]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not a Subnet: it is not JSON (Expecting property name"),
            ("[1]", "not a Subnet: it holds a list instead of an object."),
            ('{"version": 1, "neurons": [1]}', "it has the keys ['neurons'] instead of ['kv_groups', 'neurons']."),
            (text(heads=[1]), "it has the keys ['heads', 'kv_groups', 'neurons'] instead of ['kv_groups', 'neurons']."),
            (text(version=2), "not a Subnet: it has version 2; this flextron reads 1."),
            (text(neurons=[8.0, 4]), "neurons[0] is 8.0; a width is a whole number from 0 up."),
            (text(neurons=8), "neurons must be one whole number per layer, not 8."),
        ],
    )
    def test_refuses(self, content, message, tmp_path):
        with pytest.raises(SubnetError) as error:
            Subnet.from_json(content)
        assert message in str(error.value)
        (tmp_path / "subnet.json").write_text(content)
        with pytest.raises(SubnetError) as error:
            Subnet.load(tmp_path / "subnet.json")
        assert str(error.value).startswith(f"cannot read a Subnet from {tmp_path / 'subnet.json'}: ")
        assert message in str(error.value)

    def test_loads_a_file(self, tmp_path):
        (tmp_path / "subnet.json").write_text(text())
        assert Subnet.load(str(tmp_path / "subnet.json")) == Subnet((8, 4), (2, 0))

    def test_names_the_file_that_is_missing_or_binary(self, tmp_path):
        with pytest.raises(SubnetError, match=r"cannot read a Subnet from .*gone.json: .*No such file"):
            Subnet.load(tmp_path / "gone.json")
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
        with pytest.raises(SubnetError, match=r"cannot read a Subnet from .*binary.json: .*decode"):
            Subnet.load(tmp_path / "binary.json")


class TestSearchSpace:
    @pytest.mark.parametrize(
        ("neurons", "step", "choices"),
        [(1536, 64, 25), (11008, 512, 23), (40, 2, 21), (16, 1, 17), (7, 1, 8)],
    )
    def test_default_step(self, neurons, step, choices):
        space = SearchSpace.of_model(layers=2, neurons=neurons, kv_groups=3)
        assert space.neurons[:2] == (0, step)
        assert space.neurons[-1] == neurons
        assert len(space.neurons) == choices
        assert space.kv_groups == (0, 1, 2, 3)

    def test_full_width_is_a_choice_where_the_step_does_not_divide_it(self):
        assert SearchSpace.of_model(layers=1, neurons=100, kv_groups=1, neuron_step=48).neurons == (0, 48, 96, 100)

    @pytest.mark.parametrize("step", [-1, 0, 101])
    def test_refuses_a_step(self, step):
        message = f"neuron_step is {step}; it must lie between 1 and the model's 100 neurons."
        with pytest.raises(ValueError, match=message):
            SearchSpace.of_model(layers=1, neurons=100, kv_groups=1, neuron_step=step)

    @pytest.mark.parametrize("widths", [(), (0,), (8, 4), (4, 4), (-4, 8), (0.5, 8)], ids=str)
    @pytest.mark.parametrize("axis", ["neurons", "kv_groups"])
    def test_refuses_choices(self, axis, widths):
        with pytest.raises(ValueError, match=f"{axis} must be ascending widths from 0 up, without repeats, got"):
            SearchSpace(**{"layers": 1, "neurons": (0, 8), "kv_groups": (0, 2), axis: widths})

    def test_refuses_no_layers(self):
        with pytest.raises(ValueError, match="a whole number of layers from 1 up, got 0"):
            SearchSpace(0, (0, 8), (0, 2))

    def test_uniform(self):
        assert SPACE.uniform(16) == Subnet((16,) * 3, (2,) * 3)
        assert SPACE.uniform(kv_groups=0) == Subnet((48,) * 3, (0,) * 3)
        assert SPACE.uniform(0, 1) == Subnet((0,) * 3, (1,) * 3)
        assert SPACE.full == Subnet((48,) * 3, (2,) * 3)
        assert SPACE.smallest == Subnet((0,) * 3, (0,) * 3)
        assert SearchSpace(1, (8, 16), (1, 2)).smallest == Subnet((8,), (1,))
        with pytest.raises(SubnetError, match=r"neurons\[0\] is 17, not a choice"):
            SPACE.uniform(17)

    @pytest.mark.parametrize(
        ("subnet", "message"),
        [
            (
                Subnet((48,) * 2, (2,) * 2),
                "this Subnet is for a model of 2 layers; this model has 3. "
                "A Subnet belongs to the checkpoint it was chosen for.",
            ),
            (Subnet((48, 64, 48), (2,) * 3), "neurons[1] is 64; a layer of this model has 48."),
            (Subnet((48,) * 3, (2, 2, 3)), "kv_groups[2] is 3; a layer of this model has 2."),
            (
                Subnet((48, 48, 20), (2,) * 3),
                "neurons[2] is 20, not a choice of the search space; the nearest are 16 and 32. "
                "Use one of them or a search space with a smaller step.",
            ),
        ],
    )
    def test_check_refuses(self, subnet, message):
        with pytest.raises(SubnetError) as error:
            SPACE.check(subnet)
        assert str(error.value) == message

    def test_below_the_smallest_choice_only_that_is_near(self):
        with pytest.raises(SubnetError, match=r"neurons\[0\] is 4, .*; the nearest are 8\. "):
            SearchSpace(1, (8, 16), (1,)).check(Subnet((4,), (1,)))

    def test_check_passes_all_choices(self):
        for neurons in SPACE.neurons:
            for kv_groups in SPACE.kv_groups:
                SPACE.check(Subnet((neurons, 48, 0), (0, kv_groups, 2)))


def test_no_torch_behind_the_nouns():
    code = (
        "import sys; sys.argv = ['flextron'];"  # as the command line: a library registers its classes when imported
        "import flextron.subnet, flextron.elastic.families, flextron.errors;"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
