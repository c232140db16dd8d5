"""The GPU code path, tested without a GPU: tensors without content on a device other than the CPU.

FakeTensorMode computes only shapes and devices. An operation on two devices raises, as on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from model import MODELS, create_model
from utils import BatchLoader

DEVICE = torch.device("lazy", 0)  # an accelerator whose autograd runs in the CPU's thread
AUGMENTATION = dict(degrees=10, shift=0.06, scale=0.06)
BATCHES = 53  # of one image each

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


class Accelerator(TorchDispatchMode):
    """Tensors made or moved inside have a shape and a device, but no content.

    What a program reads from them is 0; in a mask, the first `nonzero` elements are not. `waits` lists
    the operations for which a program has to wait for the device.
    """

    def __init__(self, nonzero=0):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.nonzero = nonzero
        self.waits = []

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._to_copy.default and not isinstance(args[0], FakeTensor):
            args = (self.fake.from_tensor(args[0]),)  # torch 2.3 would copy the content
        if func is aten._local_scalar_dense.default:
            result = 0.0 if args[0].is_floating_point() else 0
        elif func is aten.nonzero.default:
            result = args[0].new_zeros(self.nonzero, args[0].dim(), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        if self.is_wait(func, args, result):
            self.waits.append(func)
        return result

    def is_wait(self, func, args, result):
        """Return whether an operation reads from the device or copies from it to the CPU."""
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not any(tensor.device == DEVICE for tensor in tensors):
            return False
        return func in READS or (func in COPIES and result.device.type == "cpu")


def element_list(tensor):
    """Replace FakeTensor's own tolist, which cannot read values."""
    return [element.item() for element in tensor]


@pytest.fixture(autouse=True)
def settings_for_tensors_without_content(monkeypatch):
    monkeypatch.setattr(FakeTensor, "tolist", element_list)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def linear_network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10), torch.nn.LogSoftmax(dim=1))


def train_on_device(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return utils.train(model, DEVICE, loader, optimizer, F.nll_loss)


def record_batches(model, accelerator):
    """Return a list to which each batch appends the number of waits before its forward pass."""
    waits = []
    model.register_forward_pre_hook(lambda module, args: waits.append(len(accelerator.waits)))
    return waits


def batches_with_waits(waits, accelerator):
    """Return the numbers of the batches after whose forward pass the program waited."""
    after = [*waits[1:], len(accelerator.waits)]
    numbers = []
    for number, count in enumerate(after):
        if count > waits[number]:
            numbers.append(number)
    return numbers


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_augmented_batches(small, name):
    model = create_model(name)
    with Accelerator():
        model.to(DEVICE)
        train_on_device(model, BatchLoader(small(12), 8, DEVICE, shuffle=True, augmentation=AUGMENTATION))
    for parameter in model.parameters():
        assert parameter.device == DEVICE
        assert parameter.grad.device == DEVICE


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_evaluated(small, name):
    model = create_model(name)
    with Accelerator():
        model.to(DEVICE)
        loss, accuracy = utils.test(model, DEVICE, BatchLoader(small(12), 8, DEVICE), F.nll_loss)
    assert isinstance(loss, float)
    assert isinstance(accuracy, float)


@pytest.mark.parametrize("name", MODELS)
def test_mistakes_of_every_model_arrive_on_the_cpu(small, name):
    model = create_model(name)
    with Accelerator(nonzero=1):
        model.to(DEVICE)
        confusion, mistakes = utils.find_mistakes(model, DEVICE, BatchLoader(small(12), 8, DEVICE))
    assert confusion.device.type == "cpu"
    assert len(mistakes) == 2  # one per batch
    assert mistakes[0].image.device.type == "cpu"


@pytest.mark.parametrize("name", MODELS)
def test_prediction_of_every_model_arrives_on_the_cpu(monkeypatch, name):
    monkeypatch.setattr(utils, "prepare_digit", lambda image: torch.zeros(1, 1, 28, 28))
    model = create_model(name)
    with Accelerator():
        probabilities = utils.predict(model.to(DEVICE), "digit.png")
    assert probabilities.shape == (10,)
    assert probabilities.device.type == "cpu"


def test_a_tensor_left_on_the_cpu_raises(small):
    model = linear_network()
    misplaced = torch.zeros(10)
    model.register_forward_hook(lambda module, args, output: output + misplaced)
    with Accelerator(), pytest.raises(RuntimeError, match="device"):
        model.to(DEVICE)
        train_on_device(model, BatchLoader(small(12), 8, DEVICE))


def test_training_waits_at_the_first_every_50th_and_the_last_batch(small):
    model = linear_network()
    with Accelerator() as accelerator:
        waits = record_batches(model, accelerator)
        model.to(DEVICE)
        loader = BatchLoader(small(BATCHES), 1, DEVICE, shuffle=True, augmentation=AUGMENTATION)
        train_on_device(model, loader)
    assert len(waits) == BATCHES
    assert batches_with_waits(waits, accelerator) == [0, 50, BATCHES - 1]


def test_evaluation_waits_after_the_last_batch(small):
    model = linear_network()
    with Accelerator() as accelerator:
        waits = record_batches(model, accelerator)
        model.to(DEVICE)
        utils.test(model, DEVICE, BatchLoader(small(BATCHES), 1, DEVICE), F.nll_loss)
    assert len(waits) == BATCHES
    assert batches_with_waits(waits, accelerator) == [BATCHES - 1]
