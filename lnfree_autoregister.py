"""
With the project installed, the Auto classes of transformers know the model type `lnfree` in every process, also where
nothing imported `modeling_lnfree`: Python imports this file when it starts, by lnfree_autoregister.pth. Neither torch
nor the project is imported before a model of this type is asked for.
"""

import sys


CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"


class _Deferred(type):
    """Whatever is asked of the class below is asked of the real one, whose import registers all the Auto classes."""

    def __getattr__(cls, name):
        from modeling_lnfree import LNFreeConfig as real

        return getattr(real, name)

    def __call__(cls, *args, **kwargs):
        from modeling_lnfree import LNFreeConfig as real

        return real(*args, **kwargs)


class LNFreeConfig(metaclass=_Deferred):
    """Holds the place of `modeling_lnfree.LNFreeConfig` in AutoConfig."""

    # As a class of transformers it gives way to a folder's own code where the user says `trust_remote_code=True`.
    __module__ = CONFIGURATION_AUTO


class AutoRegister:
    """Finder on `sys.meta_path`: registers the type as soon as transformers has its AutoConfig."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != CONFIGURATION_AUTO:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                # a transformers in which this does not work is no worse than one that never heard of the type
                try:
                    module.AutoConfig.register("lnfree", LNFreeConfig)
                    module.LNFreeConfig = LNFreeConfig  # where pickle looks for it
                except Exception:
                    pass

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AutoRegister)
