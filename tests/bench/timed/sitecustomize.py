"""Steps that take a known time, in the engine process of a test's server: PYTHONPATH points here, so the server has no hook for it."""

import os
import sys
import time

COSTS = os.environ.get("SIGHTLINE_TEST_COSTS")

if COSTS and "sightline.engine.process" in getattr(sys, "orig_argv", []):
    import msgspec

    from sightline.bench.simulate import Costs, TimedModel
    from sightline.engine.runner import ModelRunner
    from sightline.models import drain

    model = TimedModel(msgspec.json.decode(COSTS, type=Costs))

    def timed(name):
        compute, count = getattr(ModelRunner, name), getattr(model, name)

        def wrapped(self, *args):
            began = time.monotonic()
            result = compute(self, *args)
            count(*args)
            time.sleep(max(0.0, began + model.take_spent() - time.monotonic()))
            return result

        setattr(ModelRunner, name, wrapped)

    def timed_encoding(self, images, pixels, compute=ModelRunner.encoding):
        began = time.monotonic()
        features = drain(compute(self, images, pixels))
        yield from model.encoding(images, pixels)
        time.sleep(max(0.0, began + model.take_spent() - time.monotonic()))
        return features

    ModelRunner.encoding = timed_encoding
    timed("forward")
