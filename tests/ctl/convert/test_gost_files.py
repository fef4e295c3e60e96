"""Files of configuration of gost: version 3 in YAML and JSON, version 2 in JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from netproxy.ctl.convert.source import ConversionError
from netproxy.errors import ConfigError
from tests.ctl.convert.converting import Converted, converted

pytest.importorskip("yaml")

FILE = """\
services:
- name: web
  addr: "192.0.2.1:8080"
  admission: office
  bypass: inside
  climiter: few
  handler:
    type: http
    auther: people
    chain: out
    metadata: {sniffing: true, knock: x}
  listener:
    type: tls
- name: ssh
  addr: 127.0.0.1:2222
  handler: {type: tcp}
  listener: {type: tcp}
  forwarder:
    nodes:
    - {name: target, addr: "192.0.2.7:22"}
chains:
- name: out
  hops:
  - name: first
    selector: {strategy: fifo, maxFails: 1}
    nodes:
    - name: a
      addr: a.example:1080
      connector:
        type: socks5
        auth: {username: joe, password: s3cret}
      dialer: {type: tcp}
    - name: b
      addr: b.example:443
      connector: {type: http}
      dialer:
        type: tls
        tls: {secure: true, serverName: proxy.example}
authers:
- name: people
  auths:
  - {username: bob, password: one}
  - {username: ann, password: two}
admissions:
- {name: office, whitelist: true, matchers: [10.0.0.0/8]}
bypasses:
- {name: inside, matchers: [192.168.0.0/16, "*.lan:80"]}
climiters:
- {name: few, limits: ["$ 100", "$$ 10", "10.0.0.1 5"]}
tls: {certFile: cert.crt, keyFile: cert.key}
log: {level: warn, output: stderr}
api: {addr: ":18080"}
"""
WHOLE = """\
# Made by netproxyctl convert from g.yml.
# Check it with: netproxyd -t -c FILE
# Not carried over: g.yml:6: services.climiter: few: 10.0.0.1: limits are for all or for each
# Not carried over: g.yml:11: services.handler.metadata.knock: x: a wrong login is answered as such
# Not carried over: g.yml:52: api.addr: :18080: netproxyctl uses the control socket

listeners:
  # g.yml:3: services.addr: 192.0.2.1:8080
  - protocol: http
    listen: 192.0.2.1:8080
    network: [tcp]
    upstream: group
    tls: {certificate: cert.crt, key: cert.key}
    limits: {connections: 100, connections_per_client: 10}
    auth: required
    clients: [10.0.0.0/8]
  # g.yml:15: services.addr: 127.0.0.1:2222
  - {protocol: tcp, listen: "127.0.0.1:2222", target: "192.0.2.7:22"}

upstreams:
  # g.yml:28: chains.hops.nodes.addr: a.example:1080
  # its URL has a password: better write !file and the name of a file with the URL
  a.example: socks5h://joe:s3cret@a.example:1080
  # g.yml:34: chains.hops.nodes.addr: b.example:443
  b.example: {url: "https://b.example:443", tls: {server_name: proxy.example}}
  # g.yml:28: chains.hops.nodes.addr: a.example:1080
  group: {members: [a.example, b.example], balance: failover}

rules:
  # g.yml:5: services.bypass: inside
  - {ip: 192.168.0.0/16, listener: http-8080, via: block}
  - {domain: "*.lan", port: 80, listener: http-8080, via: block}

users:
  # g.yml:3: services.addr: 192.0.2.1:8080
  # a password in plain text: better write its hash (netproxyctl hash-password), or !file
  bob: {password: one}
  # g.yml:3: services.addr: 192.0.2.1:8080
  # a password in plain text: better write its hash (netproxyctl hash-password), or !file
  ann: {password: two}

# g.yml:51: log.level: warn
log: {level: warning}
"""
SERVICE = 'services: [{name: a, addr: "127.0.0.1:80", %s}]\n'


def gost(text: str, path: str = "g.yml") -> Converted:
    return converted("gost", text, path)


def test_file_becomes_a_configuration() -> None:
    assert gost(FILE).text == WHOLE


def test_json_is_the_same() -> None:
    import yaml

    text = json.dumps(yaml.safe_load(FILE), indent="\t")
    assert gost(text, "gost.json").config == gost(FILE).config


def test_file_of_version_2() -> None:
    text = json.dumps(
        {
            "Debug": True,
            "Retries": 0,
            "ServeNodes": [":8080"],
            "ChainNodes": ["socks5://joe:s3cret@192.0.2.1:1080"],
            "Routes": [
                {"ServeNodes": ["tcp://:22/192.0.2.7:22"], "ChainNodes": ["http://192.0.2.2:80"]}
            ],
        }
    )
    result = gost(text, "gost.json")
    assert [entry["upstream"] for entry in result.config["listeners"]] == ["192.0.2.1", "192.0.2.2"]
    comments = [line for line in result.text.splitlines() if "# " in line]
    assert "s3cret" not in "".join(comments)


def test_command_reads_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "gost.yml").write_text(FILE)
    result = gost("gost -C gost.yml -L :9999\n", str(tmp_path / "gost.sh"))
    listens = [entry["listen"] for entry in result.config["listeners"]]
    assert sorted(listens) == ["127.0.0.1:2222", "192.0.2.1:8080", ":9999"]
    assert len(gost("gost -L :80 -C /nonexistent\n", "gost.sh").lost) == 1


@pytest.mark.parametrize(
    "service, expected",
    [
        ("handler: {type: auto}, listener: {type: tcp}", {"protocol": "sps", "network": ["tcp"]}),
        (
            "handler: {type: socks5, metadata: {udp: true, bind: true}}, listener: {type: tcp}",
            {"protocol": "socks5"},
        ),
        (
            "handler: {type: red, metadata: {sniffing: true}}, listener: {type: red}",
            {"protocol": "redirect", "sniff_dial": "name"},
        ),
        (
            "handler: {type: tcp, metadata: {proxyProtocol: 1}}, listener: {type: tcp}, "
            "interface: eth0, sockopts: {mark: 7}, forwarder: {nodes: [{addr: 'x.example:1'}]}",
            {
                **{"protocol": "tcp", "target": "x.example:1", "bind": "eth0"},
                **{"upstream": "marked", "send_proxy": "v1"},
            },
        ),
    ],
)
def test_service_is_a_listener(service: str, expected: dict[str, object]) -> None:
    [listener] = gost(SERVICE % service).config["listeners"]
    assert listener == {"listen": "127.0.0.1:80", **expected}


def test_users_of_a_list_that_cannot_be_read_admit_nobody() -> None:
    service = "handler: {type: http, auther: x}, listener: {type: tcp}"
    result = gost(SERVICE % service + "authers: [{name: x, file: {path: /nonexistent}}]\n")
    assert result.config["listeners"][0]["auth"] == "required"
    assert list(result.config["users"]) == ["change-me"]


@pytest.mark.parametrize("chain", ["chain: x", "chainGroup: {chains: [x, y]}"])
def test_service_whose_chain_is_not_known_is_blocked(chain: str) -> None:
    """It never goes direct: flows of a proxy must not leave from this machine."""
    result = gost(SERVICE % f"handler: {{type: http, {chain}}}, listener: {{type: tcp}}")
    assert result.config["listeners"][0]["upstream"] == "block"
    assert result.lost


UNKNOWN_LISTS = (
    "file: {path: /nonexistent}",
    "http: {url: 'http://a/?token=s3cret'}",
    "plugin: {}",
)


@pytest.mark.parametrize("where", UNKNOWN_LISTS)
@pytest.mark.parametrize("whitelist", ["true", "false"])
def test_service_refuses_all_if_its_list_is_not_known(where: str, whitelist: str) -> None:
    if where == "plugin: {}":
        where = "plugin: {addr: a}"
    entry = f"[{{name: x, whitelist: {whitelist}, {where}}}]"
    service = "%s: x, handler: {type: http}, listener: {type: tcp}"
    result = gost(SERVICE % (service % "bypass") + f"bypasses: {entry}\n")
    assert result.rules == [{"via": "block"}] or result.config.get("default") == "block"
    result = gost(SERVICE % (service % "admission") + f"admissions: {entry}\n")
    assert result.config["listeners"][0]["clients"] == ["127.0.0.1"]
    assert "s3cret" not in result.text + str(result.notes.told())


@pytest.mark.parametrize("where", UNKNOWN_LISTS[:2])
def test_nothing_is_led_past_a_hop_whose_list_is_not_known(where: str) -> None:
    chain = "chains: [{name: c, hops: [{name: h, bypass: x, nodes: [{addr: '192.0.2.1:80'}]}]}]\n"
    service = "handler: {type: http, chain: c}, listener: {type: tcp}"
    text = SERVICE % service + chain + f"bypasses: [{{name: x, whitelist: true, {where}}}]\n"
    result = gost(text)
    [listener] = result.config["listeners"]
    assert result.rules == [] and listener["upstream"] == "192.0.2.1"


def test_file_reads_no_other_files_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of somebody else must not bring secrets of this machine into the result."""
    monkeypatch.setenv("TOKEN", "s3cret")
    service = "handler: {type: http, auth: {username: a, password: '${TOKEN}'}}"
    result = gost(SERVICE % f"{service}, listener: {{type: tcp}}")
    assert "s3cret" not in result.text
    with pytest.raises(ConversionError, match="!file is a tag of netproxyd alone"):
        gost(SERVICE % "handler: {type: !file /etc/hostname}, listener: {type: tcp}")


def test_secrets_of_fields_and_urls_are_not_shown() -> None:
    metadata = "metadata: {header: {Proxy-Authorization: Basic s3cret}, key: s3cret}"
    service = f"handler: {{type: http, {metadata}}}, listener: {{type: tcp}}"
    result = gost(SERVICE % service + "api: {addr: 'http://u:s3cret@a/?token=s3cret'}\n")
    assert "s3cret" not in result.text + str(result.notes.told())


def test_lists_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# names\na.example\n192.0.2.0/24  # a network\n")
    service = "bypass: x, handler: {type: http}, listener: {type: tcp}"
    text = SERVICE % service + "bypasses: [{name: x, whitelist: true, file: {path: list}}]\n"
    assert gost(text, str(tmp_path / "gost.yml")).rules == [
        {"not": {"ip": "192.0.2.0/24", "domain": "a.example"}, "via": "block"}
    ]


def test_names_are_looked_up_as_the_service_says() -> None:
    service = "resolver: r, hosts: h, handler: {type: http}, listener: {type: tcp}"
    text = SERVICE % service + (
        "resolvers: [{name: r, nameservers: [{addr: 'tls://9.9.9.9', prefer: ipv6}]}]\n"
        "hosts: [{name: h, mappings: [{ip: 192.0.2.1, hostname: a.lan, aliases: [a]}]}]\n"
    )
    assert gost(text).config["dns"] == {
        **{"servers": ["tls://9.9.9.9"], "prefer": "ipv6"},
        "hosts": {"a.lan": ["192.0.2.1"], "a": ["192.0.2.1"]},
    }


def test_port_behind_a_chain_is_a_service_of_an_agent() -> None:
    service = (
        "handler: {type: rtcp}, listener: {type: rtcp, chain: c}, "
        "forwarder: {nodes: [{addr: ':22'}]}"
    )
    text = SERVICE % service + (
        "chains: [{name: c, hops: [{name: h}]}]\n"
        "hops: [{name: h, nodes: [{addr: 'bridge.example:7000', connector: {type: relay}, "
        "dialer: {type: tls}}]}]\n"
    )
    agent = gost(text).config["tunnel"]["agent"]
    assert agent["bridge"] == "tls://bridge.example:7000"
    assert agent["services"] == {80: "127.0.0.1:22"}


@pytest.mark.parametrize("text", ["services: [\n", "services: &a [*a]\n", "{"])
def test_file_that_cannot_be_parsed_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConversionError) as caught:
        gost(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_file_is_converted_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    lines = FILE.split("\n")
    values = ("true", "{}", "[]", "socks5", "tls", ":8080", "~", "'*'", "-1", "relay", "dns", "red")
    for _ in range(chance.randint(1, 4)):
        number = chance.randrange(len(lines))
        kind = chance.choice(("delete", "repeat", "replace"))
        if kind == "delete":
            del lines[number]
        elif kind == "repeat":
            lines.insert(number, chance.choice(lines))
        else:
            lines[number] = lines[number].partition(":")[0] + ": " + chance.choice(values)
    try:
        result = gost("\n".join(lines))
    except ConversionError as error:
        assert "\n" not in str(error)
        return
    except ConfigError as error:
        # The old program would have failed as well.
        assert all("is already used by" in line for line in str(error).splitlines()), error
        return
    assert sum(result.notes.counts().values()) == len(result.notes.directives)
