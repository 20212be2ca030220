"""score_sde's NCSN++ and DDPM++, stated again in PyTorch, beside the converted ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from keras import ops

import tfdiffusion as tfd
from tfdiffusion.convert import score_sde

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
functional = torch.nn.functional
Module = torch.nn.Module

SMALL = {
    "image_size": 8,
    "nf": 8,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.0,
}
NCSNPP = {
    **SMALL,
    "sde": "vesde",
    "centered": False,
    "fir": True,
    "progressive_input": "residual",
    "embedding_type": "fourier",
    "scale_by_sigma": True,
}
DDPMPP = {**SMALL, "sde": "vpsde"}


# The network (arXiv:2011.13456, app. H), channels first.

FILTER = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64.0


def filtered(x, taps, before, after):
    """Each channel padded and convolved with the taps, at stride 1."""
    x = functional.pad(x, (before, after, before, after))
    return functional.conv2d(x, taps.expand(x.shape[1], 1, 4, 4).contiguous(), groups=x.shape[1])


def fir_down(x):
    return filtered(x, FILTER, 1, 1)[..., ::2, ::2]


def fir_up(x):
    batch, channels, height, width = x.shape
    spread = torch.zeros(batch, channels, 2 * height, 2 * width)
    spread[..., ::2, ::2] = x
    return filtered(spread, 4.0 * FILTER, 2, 1)


def normalization(channels):
    return torch.nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Residual(Module):
    def __init__(self, channels, width, embedding, resample=None):
        super().__init__()
        self.resample = resample
        self.GroupNorm_0 = normalization(channels)
        self.Conv_0 = torch.nn.Conv2d(channels, width, 3, padding=1)
        self.Dense_0 = torch.nn.Linear(embedding, width)
        self.GroupNorm_1 = normalization(width)
        self.Conv_1 = torch.nn.Conv2d(width, width, 3, padding=1)
        if channels != width or resample:
            self.Conv_2 = torch.nn.Conv2d(channels, width, 1)

    def forward(self, x, embedding):
        resample = self.resample or (lambda x: x)
        h = resample(functional.silu(self.GroupNorm_0(x)))
        h = self.Conv_0(h) + self.Dense_0(functional.silu(embedding))[:, :, None, None]
        h = self.Conv_1(functional.silu(self.GroupNorm_1(h)))
        x = resample(x)
        return ((self.Conv_2(x) if hasattr(self, "Conv_2") else x) + h) / math.sqrt(2.0)


class Projection(Module):
    def __init__(self, channels):
        super().__init__()
        self.W = torch.nn.Parameter(torch.randn(channels, channels) / math.sqrt(channels))
        self.b = torch.nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return torch.einsum("bihw,io->bohw", x, self.W) + self.b[:, None, None]


class Attention(Module):
    def __init__(self, channels):
        super().__init__()
        self.GroupNorm_0 = normalization(channels)
        for number in range(4):
            setattr(self, f"NIN_{number}", Projection(channels))

    def forward(self, x):
        h = self.GroupNorm_0(x)
        query, key, value = self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)
        scores = torch.einsum("bchw,bcij->bhwij", query, key) / math.sqrt(x.shape[1])
        weights = scores.flatten(3).softmax(-1).reshape(scores.shape)
        return (x + self.NIN_3(torch.einsum("bhwij,bcij->bchw", weights, value))) / math.sqrt(2.0)


class Smoothed(Module):
    """A strided convolution behind the filter."""

    def __init__(self, channels, width):
        super().__init__()
        self.Conv2d_0 = torch.nn.Conv2d(channels, width, 3, stride=2)

    def forward(self, x):
        return self.Conv2d_0(filtered(x, FILTER, 2, 2))


class Fourier(Module):
    def __init__(self, count):
        super().__init__()
        self.W = torch.nn.Parameter(16.0 * torch.randn(count), requires_grad=False)


class Network(Module):
    """All modules in the order of their use."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config["nf"]
        fir, pyramid = config.get("fir"), config.get("progressive_input") == "residual"
        down = fir_down if fir else (lambda x: functional.avg_pool2d(x, 2))
        up = fir_up if fir else (lambda x: functional.interpolate(x, scale_factor=2))
        fourier, features = config.get("embedding_type") == "fourier", width
        embedding = 4 * width
        modules = []
        if fourier:
            modules.append(Fourier(width))
            features = 2 * width
        modules += [torch.nn.Linear(features, embedding), torch.nn.Linear(embedding, embedding)]
        modules.append(torch.nn.Conv2d(3, width, 3, padding=1))
        channels, skips, image = width, [width], 3
        levels = len(config["ch_mult"])
        attended = [
            config["image_size"] // 2**i in config["attn_resolutions"] for i in range(levels)
        ]
        for i, factor in enumerate(config["ch_mult"]):
            for _ in range(config["num_res_blocks"]):
                modules.append(Residual(channels, factor * width, embedding))
                channels = factor * width
                modules += [Attention(channels)] if attended[i] else []
                skips.append(channels)
            if i < levels - 1:
                modules.append(Residual(channels, channels, embedding, down))
                modules += [Smoothed(image, channels)] if pyramid else []
                image = channels
                skips.append(channels)
        modules += [Residual(channels, channels, embedding), Attention(channels)]
        modules.append(Residual(channels, channels, embedding))
        for i, factor in reversed(list(enumerate(config["ch_mult"]))):
            for _ in range(config["num_res_blocks"] + 1):
                modules.append(Residual(channels + skips.pop(), factor * width, embedding))
                channels = factor * width
            modules += [Attention(channels)] if attended[i] else []
            modules += [Residual(channels, channels, embedding, up)] if i else []
        modules += [normalization(channels), torch.nn.Conv2d(channels, 3, 3, padding=1)]
        self.all_modules = torch.nn.ModuleList(modules)
        self.attended = attended
        self.register_buffer("sigmas", torch.linspace(50.0, 0.01, 10))

    def forward(self, x, time):
        """`time` is σ for a Fourier embedding, else a label from 0 to 999."""
        config, modules = self.config, iter(self.all_modules)
        if not config.get("centered", True):
            x = 2.0 * x - 1.0
        if config.get("embedding_type") == "fourier":
            angles = 2.0 * math.pi * torch.log(time)[:, None] * next(modules).W
        else:
            half = config["nf"] // 2
            angles = time[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1))
        embedding = next(modules)(torch.cat([angles.sin(), angles.cos()], -1))
        embedding = next(modules)(functional.silu(embedding))
        image = x
        x = next(modules)(x)
        skips = [x]
        for i in range(len(config["ch_mult"])):
            for _ in range(config["num_res_blocks"]):
                x = next(modules)(x, embedding)
                x = next(modules)(x) if self.attended[i] else x
                skips.append(x)
            if i < len(config["ch_mult"]) - 1:
                x = next(modules)(x, embedding)
                if config.get("progressive_input") == "residual":
                    x = image = (next(modules)(image) + x) / math.sqrt(2.0)
                skips.append(x)
        x = next(modules)(x, embedding)
        x = next(modules)(x)
        x = next(modules)(x, embedding)
        for i in reversed(range(len(config["ch_mult"]))):
            for _ in range(config["num_res_blocks"] + 1):
                x = next(modules)(torch.cat([x, skips.pop()], 1), embedding)
            x = next(modules)(x) if self.attended[i] else x
            x = next(modules)(x, embedding) if i else x
        x = functional.silu(next(modules)(x))
        x = next(modules)(x)
        return x / time[:, None, None, None] if config.get("scale_by_sigma") else x


def network(config, seed=0):
    torch.manual_seed(seed)
    made = Network(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def save(path, made, average):
    """A checkpoint: the weights of one network, and the average, which is another's."""
    state = {f"module.{name}": tensor for name, tensor in made.state_dict().items()}
    shadow = [weight.detach().clone() for weight in average.parameters() if weight.requires_grad]
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow}
    optimizer = torch.optim.Adam(made.parameters()).state_dict()
    torch.save({"optimizer": optimizer, "model": state, "ema": ema, "step": 7}, path)
    return path


def images(seed=3):
    return np.random.default_rng(seed).normal(size=(2, 8, 8, 3)).astype("float32")


def close(actual, expected, tolerance=1e-5):
    expected = expected.detach().permute(0, 2, 3, 1).numpy()
    difference = np.abs(ops.convert_to_numpy(actual) - expected).max()
    assert difference <= tolerance * np.abs(expected).max()


def to_torch(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def test_ncsnpp_gives_the_same_score(tmp_path):
    """There of images in [0, 1] at σ; here of images in [−1, 1] at 2 σ, and half as long."""
    raw, average = network(NCSNPP), network(NCSNPP, seed=1)
    with torch.no_grad():  # its frequencies are no parameters that are averaged
        average.all_modules[0].W.copy_(raw.all_modules[0].W)
    path = save(tmp_path / "checkpoint.pth", raw, average)
    unit, sigma = images(), np.array([0.05, 31.0], "float32")
    for theirs, averaged in ((average, True), (raw, False)):
        model = tfd.convert.from_score_sde(path, NCSNPP, average=averaged)
        score = theirs(to_torch(unit), torch.tensor(sigma))
        close(model.network({"x": 2.0 * unit - 1.0, "time": 2.0 * sigma}), score / 2.0)
    t = np.array([0.2, 0.9], "float32")
    sigma = 0.01 * 5000.0**t
    score = raw(to_torch(unit), torch.tensor(sigma)) / 2.0
    # The process rounds σ, and the frequencies multiply the error of its logarithm by up to 300.
    close(model.denoiser().score(ops.convert_to_tensor(2.0 * unit - 1.0), t), score, 1e-3)


@pytest.mark.parametrize("sde", ["vpsde", "subvpsde"])
def test_ddpmpp_gives_the_same_score(tmp_path, sde):
    made = network(DDPMPP)
    path = save(tmp_path / "checkpoint.pth", made, made)
    model = tfd.convert.from_score_sde(path, {**DDPMPP, "sde": sde})
    x, t = images(), np.array([0.3, 0.95], "float32")
    integral = 0.1 * t + 0.5 * 19.9 * t**2  # of β
    std = np.sqrt(-np.expm1(-integral)) if sde == "vpsde" else -np.expm1(-integral)
    score = -made(to_torch(x), torch.tensor(999.0 * t)) / torch.tensor(std)[:, None, None, None]
    close(model.denoiser().score(ops.convert_to_tensor(x), t), score, 1e-4)


def test_a_chain_is_told_its_steps(tmp_path):
    made = network(DDPMPP)
    path = save(tmp_path / "checkpoint.pth", made, made)
    model = tfd.convert.from_score_sde(path, {**DDPMPP, "continuous": False})
    x = images()
    noise = made(to_torch(x), torch.tensor([99.0, 499.0]))
    close(model.denoiser().noise(ops.convert_to_tensor(x), np.array([0.1, 0.5])), noise, 1e-4)


def test_other_files_and_settings_are_refused(tmp_path):
    made = network(DDPMPP)
    path = save(tmp_path / "checkpoint.pth", made, made)
    convert = tfd.convert.from_score_sde
    with pytest.raises(ValueError, match=r"'cifar10'.*ve/cifar10_ncsnpp_continuous"):
        convert(path, "cifar10")
    with pytest.raises(ValueError, match=r"setting of score_sde 'nff'.*Did you mean 'nf'"):
        convert(path, {"nff": 8})
    with pytest.raises(
        ValueError, match=r"resblock_type='ddpm' cannot be converted, only 'biggan'"
    ):
        convert(path, {"resblock_type": "ddpm"})
    with pytest.raises(ValueError, match=r"vesde.*needs continuous=True"):
        convert(path, {**NCSNPP, "continuous": False})
    with pytest.raises(ValueError, match=r"missing: all_modules.*left over|of another shape"):
        convert(path, {**DDPMPP, "num_res_blocks": 2})
    with pytest.raises(FileNotFoundError, match="no file"):
        convert(tmp_path / "other.pth", DDPMPP)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no network of score_sde"):
        convert(tmp_path / "other.pth", DDPMPP)
    state = torch.load(path)
    state["ema"]["shadow_params"].pop()
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"averages for \d+ weights. average=False"):
        convert(path, DDPMPP)


@pytest.mark.parametrize("name", ["ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp_continuous"])
@pytest.mark.slow
def test_the_published_networks(name):
    settings = score_sde._settings(name)
    made = tfd.networks.UNet2D(**score_sde._arguments(settings))
    made.build({"x": (None, 32, 32, 3), "time": (None,)})
    theirs = Network({**settings}).state_dict()
    del theirs["sigmas"]
    assert {slot.name: slot.shape for slot in score_sde.slots(made)} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
