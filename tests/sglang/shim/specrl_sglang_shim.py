"""An SGLang plugin: this machine may use the backend intel_amx, whose operators `sgl_kernel` beside this file has."""


def register() -> None:
    from sglang.srt.runtime_context import override_platform

    override_platform(has_amx=True).install()
