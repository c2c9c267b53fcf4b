"""The configuration of a nats-server that serves Nearloop. Pure."""

from collections.abc import Sequence

LEAF_USER = "leaf"  # the name under which servers of other regions connect to the first region's


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
    domain: str = "",
    leaf_listen_port: int = 0,
    leaf_password: str = "",
    leaf_remotes: Sequence[str] = (),
) -> str:
    """Text of a configuration file. monitor_port 0: no monitoring; max_store_bytes 0: what the server takes by itself.

    token: who connects must know it, as the user of the url `nats://TOKEN@HOST:PORT`; empty: everybody may connect.
    domain: of JetStream, for a server that is connected with those of other regions. The server of the first region takes their
    connections on leaf_listen_port, from who knows leaf_password; the others have its url with that password in leaf_remotes (leaf_url).
    """
    store = f"\n  max_file_store: {max_store_bytes}" if max_store_bytes else ""
    sync = "\n  sync_interval: always" if sync_always else ""
    named = f"\n  domain: {_quoted(domain)}" if domain else ""
    authorization = f"authorization {{\n  token: {_quoted(token)}\n}}\n" if token else ""
    monitor = f'http: "{host}:{monitor_port}"\n' if monitor_port else ""
    return f"""# Made by Nearloop.
server_name: {_quoted(server_name)}
listen: "{host}:{port}"
{monitor}max_payload: {max_payload_bytes}
max_pending: {max(64 * 1024 * 1024, 2 * max_payload_bytes)}
jetstream {{
  store_dir: {_quoted(store_dir)}{named}{store}{sync}
}}
{authorization}{_leaf_nodes(host, leaf_listen_port, leaf_password, leaf_remotes)}\
# With the second version of ack flow control, ordered consumers and key-value watches end the read loop of nats-py.
feature_flags {{
  js_ack_fc_v2: false
}}
"""


def leaf_url(address: str, password: str) -> str:
    """For leaf_remotes: the address at which the first region's server, or what stands in front of it, takes connections of leaf nodes."""
    return f"nats-leaf://{LEAF_USER}:{password}@{address}"


def _leaf_nodes(host: str, listen_port: int, password: str, remotes: Sequence[str]) -> str:
    if not listen_port and not remotes:
        return ""
    lines = []
    if listen_port:
        # Else the leafs would learn this address, and go round whatever stands between.
        lines += [f'listen: "{host}:{listen_port}"', "no_advertise: true"]
        if password:
            lines += [f"authorization {{ user: {_quoted(LEAF_USER)}, password: {_quoted(password)}, timeout: 5 }}"]
    if remotes:
        # The far server speaks only after a round trip: the second that it has by default is short for a slow path.
        entries = ", ".join(f'{{ url: {_quoted(url)}, first_info_timeout: "5s" }}' for url in remotes)
        lines += ['reconnect: "500ms"', f"remotes: [{entries}]"]
    block = "\n".join(f"  {line}" for line in lines)
    # A path that has gone silent is noticed after 3 to 4 s. Clients are asked as often, when they have said nothing for a second.
    return f'ping_interval: "1s"\nping_max: 3\nleafnodes {{\n{block}\n}}\n'


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
