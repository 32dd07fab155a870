import pytest

from sam_gym.utils.registry import Registry, unknown_name


@pytest.fixture
def shapes() -> Registry[int]:
    registry: Registry[int] = Registry("shape")
    registry.add("square", 4)
    registry.add("circle", 1)
    return registry


def test_names_are_sorted_and_found(shapes: Registry[int]) -> None:
    assert shapes.names() == ("circle", "square")
    assert shapes.get("square") == 4


def test_register_keeps_the_decorated_thing(shapes: Registry) -> None:
    @shapes.register("triangle")
    def triangle() -> int:
        return 3

    assert triangle() == 3 and shapes.get("triangle") is triangle


def test_a_name_is_taken_once(shapes: Registry[int]) -> None:
    with pytest.raises(ValueError, match=r"shape 'circle' is registered already"):
        shapes.add("circle", 2)
    assert shapes.get("circle") == 1


def test_unknown_name_lists_the_valid_ones_and_the_nearest(shapes: Registry[int]) -> None:
    with pytest.raises(ValueError) as error:
        shapes.get("sqaure")
    assert str(error.value) == (
        "Unknown shape 'sqaure'. Did you mean 'square'? Valid names: circle, square."
    )


def test_no_guess_where_nothing_is_near() -> None:
    assert str(unknown_name("thing", 17, ["b", "a"])) == "Unknown thing 17. Valid names: a, b."


def test_of_many_names_the_nearest_are_listed() -> None:
    names = [f"class {number}" for number in range(3000)]
    message = str(unknown_name("category", "clas 17", names))
    assert "Did you mean 'class 17'? Valid names: class 17, " in message
    assert message.endswith(", and 2,990 others.") and len(message) < 300
