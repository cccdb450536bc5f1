"""The plugin that runs inside SGLang. It does nothing unless a SPECRL variable is set."""
