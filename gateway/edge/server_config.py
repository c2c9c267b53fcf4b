"""The configuration of a nats-server that serves Nearloop. Pure."""


def server_config(
    port: int,
    store_dir: str,
    *,
    host: str = "127.0.0.1",
    server_name: str = "nearloop",
    monitor_port: int = 0,
    max_payload_bytes: int = 8 * 1024 * 1024,
    max_store_bytes: int = 0,
    sync_always: bool = False,
    token: str = "",
) -> str:
    """Text of a configuration file. monitor_port 0: no monitoring; max_store_bytes 0: what the server takes by itself.

    token: who connects must know it, as the user of the url `nats://TOKEN@HOST:PORT`; empty: everybody may connect.
    """
    store = f"\n  max_file_store: {max_store_bytes}" if max_store_bytes else ""
    sync = "\n  sync_interval: always" if sync_always else ""
    authorization = f"authorization {{\n  token: {_quoted(token)}\n}}\n" if token else ""
    monitor = f'http: "{host}:{monitor_port}"\n' if monitor_port else ""
    return f"""# Made by Nearloop.
server_name: {_quoted(server_name)}
listen: "{host}:{port}"
{monitor}max_payload: {max_payload_bytes}
max_pending: {max(64 * 1024 * 1024, 2 * max_payload_bytes)}
jetstream {{
  store_dir: {_quoted(store_dir)}{store}{sync}
}}
{authorization}# With the second version of ack flow control, ordered consumers and key-value watches end the read loop of nats-py.
feature_flags {{
  js_ack_fc_v2: false
}}
"""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
