"""Pictures, read back from their files."""

import imageio.v3 as iio
import numpy as np
import pytest

import tfdiffusion as tfd
from tfdiffusion import plotting


def test_grid_holds_each_image_where_it_belongs():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    grid = plotting.image_grid(images, columns=3, padding=1, scale=1, background=9)
    assert grid.shape == (7, 13)
    for i in range(6):
        row, column = divmod(i, 3)
        cell = grid[1 + row * 3 : 3 + row * 3, 1 + column * 4 : 4 + column * 4]
        assert (cell == (i if i < 5 else 9)).all()
    edges = np.concatenate([grid[[0, 3, 6]].ravel(), grid[:, [0, 4, 8, 12]].ravel()])
    assert (edges == 9).all()


def test_floats_become_the_pixels_that_their_range_says():
    images = np.array([-1.0, 0.0, 1.0, 3.0], np.float32).reshape(1, 2, 2, 1)
    grid = plotting.image_grid(images, padding=0, scale=1)
    assert grid.min() == 0 and grid.max() == 255
    assert grid[0, 1] in (127, 128) and grid[1, 1] == 255


def test_enlargement_repeats_pixels():
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    small = plotting.image_grid(images, scale=1)
    np.testing.assert_array_equal(plotting.image_grid(images, scale=3)[1::3, 1::3], small)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((4, 8, 8)), "shape"),
        (np.full((1, 4, 4, 1), np.nan), "NaN"),
        (np.full((1, 4, 4, 1), 200.0), "255"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        plotting.image_grid(images)


def test_saved_grid_reads_back(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 1))
    grid = plotting.save_grid(images, tmp_path / "new" / "grid.png")
    np.testing.assert_array_equal(iio.imread(tmp_path / "new" / "grid.png"), grid)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_gif_runs_from_the_first_state_to_the_last_and_holds_it(tmp_path):
    generator = np.random.default_rng(0)
    end = np.sign(generator.normal(size=(4, 6, 6, 1)))
    noise = generator.normal(size=(4, 6, 6, 1))
    states = np.stack([(1 - s) * noise + s * end for s in np.linspace(0, 1, 30)])
    file = tmp_path / "path.gif"
    chosen = plotting.save_path_gif(states, file, seconds=2.0, hold=1.0, frames=12, scale=2)
    assert chosen[0] == 0 and chosen[-1] == 29 and (np.diff(chosen) > 0).all()
    frames = iio.imread(file, index=None)
    assert 2 <= len(frames) <= 12
    last = frames[-1][..., 0] if frames.ndim == 4 else frames[-1]
    np.testing.assert_array_equal(last, plotting.image_grid(end, scale=2))
    shown = [iio.immeta(file, index=i)["duration"] for i in range(len(frames))]
    assert shown[-1] == 1000 and sum(shown) == pytest.approx(3000, rel=0.05)
    assert iio.immeta(file)["loop"] == 0
    with pytest.raises(ValueError, match="shape"):
        plotting.save_path_gif(states[:, 0], file)


def test_curves_show_what_they_were_given(tmp_path):
    history = {"loss": [1.0, 0.5, 0.3], "val_loss": [0.9, 0.6, 0.4]}
    history |= {f"val_loss_q{i}": [0.5 / i, 0.4 / i, 0.3 / i] for i in range(1, 5)}
    figure = plotting.loss_curve(history, tmp_path / "loss.png")
    lines = [line.get_ydata() for axis in figure.axes for line in axis.get_lines()]
    for values in history.values():
        assert any(len(line) == 3 and np.allclose(line, values) for line in lines)
    assert all(axis.get_xlabel() for axis in figure.axes)
    assert iio.imread(tmp_path / "loss.png").std() > 5


def test_schedule_curves_draw_each_process(tmp_path):
    names = ["linear", "cosine", "flow"]
    figure = plotting.schedule_curves(
        {name: tfd.processes.get(name) for name in names}, tmp_path / "schedules.png"
    )
    texts = [t.get_text() for axis in figure.axes for t in axis.texts]
    texts += [t.get_text() for a in figure.axes if a.get_legend() for t in a.get_legend().texts]
    texts += [t.get_text() for legend in figure.legends for t in legend.texts]
    assert all(any(name in text for text in texts) for name in names)


def test_points_and_fields_keep_their_aspect(tmp_path):
    points = np.random.default_rng(0).normal(size=(200, 2))
    figures = [
        plotting.scatter_2d(points, tmp_path / "points.png"),
        plotting.field_2d(lambda x: -x, tmp_path / "field.png", limits=(-2, 2), samples=points),
    ]
    for figure in figures:
        assert figure.axes[0].get_aspect() in ("equal", 1.0)
    with pytest.raises(ValueError, match="shape"):
        plotting.scatter_2d(np.zeros((3, 3)))


def test_bits_and_rate_distortion(tmp_path):
    """The curves hold what was given: density over t, its sum, grey levels."""
    edges, bits = np.linspace(0, 1, 6), np.array([2.0, 1.0, 0.5, 0.0, 0.25])
    figure = plotting.bits_by_time({"a": (edges, bits), "b": (edges, 2 * bits)}, tmp_path / "a.png")
    density, total = figure.axes
    np.testing.assert_allclose(density.patches[0].get_data().values[:3], bits[:3] / 0.2)
    assert total.lines[0].get_ydata()[0] == 3.75 and total.lines[1].get_ydata()[-1] == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    figure = plotting.rate_distortion({"a": ([0.0, 1.0], [1.0, 0.1])}, tmp_path / "r.svg")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [127.5, 12.75])
    with pytest.raises(ValueError, match="5 edges for 5 bits"):
        plotting.bits_by_time({"a": (edges[1:], bits)})
    for draw in (plotting.bits_by_time, plotting.rate_distortion):
        with pytest.raises(ValueError, match="is empty"):
            draw({})


def test_notebook_style_is_that_of_the_library():
    import matplotlib

    with matplotlib.rc_context():
        plotting.use_notebook_style()
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        figure = plotting.loss_curve({"loss": [1.0, 0.5], "val_loss": [1.0, 0.6]})
        assert [line.get_color() for line in figure.axes[0].get_lines()] == colours[:2]
        width = figure.get_figwidth()
        assert iio.imread(figure._repr_png_()).shape[1] == pytest.approx(100 * width, abs=2)
    assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] != colours


def test_a_field_can_be_drawn_in_axes_of_ones_own():
    figure = plotting.scatter_2d({"left": np.zeros((3, 2)), "right": np.ones((3, 2))})
    left, right = figure.axes[:2]
    assert plotting.field_2d(lambda x: -x, limits=(-1, 1), title="mine", ax=right) is figure
    assert right.get_title() == "mine" and left.get_title() == "left"


def test_points_move_from_the_first_state_to_the_last(tmp_path):
    states = np.linspace([[-1.0, 0.0]], [[1.0, 0.0]], 21)  # one point, from left to right
    file = tmp_path / "points.gif"
    chosen = plotting.save_points_gif(
        {"a": states, "b": -states},
        file,
        limits=(-2, 2),
        titles=[f"step {i}" for i in range(21)],
        trail=2,
        frames=5,
        seconds=2,
        hold=1,
    )
    np.testing.assert_array_equal(chosen, [0, 5, 10, 15, 20])
    pictures = iio.imread(file, index=None)
    assert len(pictures) == 5 and iio.immeta(file)["loop"] == 0
    shown = [iio.immeta(file, index=i)["duration"] for i in range(5)]
    assert shown[-1] == 1000 and sum(shown) == 3000
    rgb = pictures[..., :3].astype(float)
    black = (rgb.sum(-1) < 100)[:, rgb.shape[1] // 4 : 3 * rgb.shape[1] // 4]  # the upright axes
    assert black[0].any() and all(np.array_equal(frame, black[0]) for frame in black[1:])
    blue = (rgb[..., 2] - rgb[..., 0] > 100) & (rgb[..., 1] < 150)  # the point's colour
    half = rgb.shape[2] // 2
    first, second = (
        [frame.nonzero()[1].mean() for frame in side]
        for side in (blue[..., :half], blue[..., half:])
    )
    assert np.all(np.diff(first) > 5) and np.all(np.diff(second) < -5)
    for wrong, words in [(states[:, 0], "shape"), (states[:1], "S >= 2"), (states * np.nan, "NaN")]:
        with pytest.raises(ValueError, match=words):
            plotting.save_points_gif(wrong, file)
    with pytest.raises(ValueError, match="titles must be 21 texts"):
        plotting.save_points_gif(states, file, titles=["one"])
    with pytest.raises(ValueError, match="trail"):
        plotting.save_points_gif(states, file, trail=-1)
