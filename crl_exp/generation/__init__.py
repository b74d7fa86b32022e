"""Batched generation from prompts that are read once, under the control of any controllers.

`engine` takes jobs of several controllers, `decode` plays one batch, `controller` says what a
controller is. It knows neither methods nor experiments.
"""
