"""SGLang: the plugin that runs inside a server, and the client that talks to one."""
