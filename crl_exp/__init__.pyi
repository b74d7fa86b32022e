from crl_exp.generation.controller import Controller as Controller
from crl_exp.generation.engine import Engine as Engine
from crl_exp.launcher.api import load_model as load_model
from crl_exp.launcher.api import load_saes as load_saes
from crl_exp.launcher.api import load_task as load_task
from crl_exp.launcher.api import run as run
from crl_exp.launcher.composing import compose as compose
from crl_exp.launcher.finished import load_run as load_run
from crl_exp.models.activations import read_activations as read_activations
from crl_exp.report.frames import read_sweep as read_sweep

__version__: str
__all__ = [
    "Controller",
    "Engine",
    "__version__",
    "compose",
    "load_model",
    "load_run",
    "load_saes",
    "load_task",
    "read_activations",
    "read_sweep",
    "run",
]
