//! WireGuard devices of several makes, configured by stock tools.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fs};

use super::{Host, must, until};

/// Who made the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ours,
    /// Ours with this value of MARGAY_OFFLOAD.
    Offload(&'static str),
    WireguardGo,
    Boringtun,
}

/// A running device on a host; its process ends with it.
pub struct Side {
    pub host: Host,
    pub kind: Kind,
    pub interface: String,
    pub port: u16,
    pub public_key: String,
    pub process: Child,
}

/// Our own binary.
pub fn ours() -> &'static str {
    env!("CARGO_BIN_EXE_mesh-datapath")
}

/// boringtun-cli, which Debian has not.
fn boringtun_cli() -> PathBuf {
    let cache = env::var_os("MARGAY_CACHE").map(PathBuf::from);
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache/margay");
    let path = cache.unwrap_or_else(home).join("bin/boringtun-cli");
    assert!(path.exists(), "{} is not there: run `make peers`", path.display());
    path
}

/// Writes a new private key to the world's /run; returns the file and the public key.
pub fn new_key(name: &str) -> (String, String) {
    let path = format!("/run/{name}.key");
    let key = must(Command::new("wg").arg("genkey"));
    fs::write(&path, &key).unwrap();
    let public = must(Command::new("sh").arg("-c").arg(format!("wg pubkey < {path}")));
    (path, public.trim().to_owned())
}

impl Side {
    /// Starts a device in the foreground and waits until it answers.
    pub fn start(host: Host, kind: Kind) -> Self {
        let interface = format!("wg-{}", host.name());
        let process = Self::spawn(host, kind, &interface);
        answers(&interface);
        let port = 51820 + u16::from(host.number());
        let (key, public_key) = new_key(host.name());
        let side = Self { host, kind, interface, port, public_key, process };
        side.wg(&format!("private-key {key} listen-port {port}"));
        host.run("ip", &format!("addr add 10.9.0.{}/24 dev {}", host.number(), side.interface));
        host.run("ip", &format!("addr add fd09::{}/64 dev {} nodad", host.number(), side.interface));
        host.run("ip", &format!("link set {} up mtu 1420", side.interface));
        side
    }

    pub fn spawn(host: Host, kind: Kind, interface: &str) -> Child {
        let mut command = match kind {
            Kind::Ours | Kind::Offload(_) => host.command(ours()),
            Kind::WireguardGo => host.command("wireguard-go"),
            Kind::Boringtun => host.command(boringtun_cli().to_str().unwrap()),
        };
        if kind == Kind::Boringtun {
            command.arg("--disable-drop-privileges");
        }
        if let Kind::Offload(value) = kind {
            command.env("MARGAY_OFFLOAD", value);
        }
        command.args(["-f", interface]).env("RUST_LOG", "info").env("WG_PROCESS_FOREGROUND", "1");
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    }

    /// `wg set` with these arguments.
    pub fn wg(&self, arguments: &str) {
        self.host.run("wg", &format!("set {} {arguments}", self.interface));
    }

    /// `wg show INTERFACE WHAT`, first value of the only peer.
    pub fn show(&self, what: &str) -> String {
        let text = self.host.run("wg", &format!("show {} {what}", self.interface));
        text.split_whitespace().nth(1).unwrap_or_default().to_owned()
    }

    /// Makes `peer` a peer, with its endpoint or without.
    pub fn befriend(&self, peer: &Side, endpoint: Option<&str>) {
        let n = peer.host.number();
        let endpoint = endpoint.map(|e| format!("endpoint {e}")).unwrap_or_default();
        self.wg(&format!("peer {} allowed-ips 10.9.0.{n}/32,fd09::{n}/128 {endpoint}", peer.public_key));
    }

    /// Packets that the TUN took from the host's kernel and gave to it; large ones count once.
    pub fn packets(&self) -> [u64; 2] {
        let text = self.host.run("ip", &format!("-s -o link show {}", self.interface));
        let number = |direction: &str| {
            let numbers = text.split(direction).nth(1).unwrap().split('\\').nth(1).unwrap();
            numbers.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        ["TX:", "RX:"].map(number)
    }

    /// A counter of ours, 0 when it is not there.
    pub fn drops(&self, reason: &str) -> u64 {
        let client = mesh_uapi::Client::new(mesh_uapi::client::socket_path(&self.interface));
        client.stats().unwrap().drops.get(reason).copied().unwrap_or(0)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until the device's socket answers.
pub fn answers(interface: &str) {
    let socket = format!("/var/run/wireguard/{interface}.sock");
    until(&format!("{interface} answers"), || {
        Path::new(&socket).exists()
            && Command::new("wg").args(["show", interface]).output().unwrap().status.success()
    });
}

/// Two devices that know each other's key.
pub struct Tunnel {
    pub left: Side,
    pub right: Side,
}

/// A tunnel in which only the left side knows where the other is, at `endpoint` with `PORT` for its port.
pub fn tunnel(left: Kind, right: Kind, endpoint: &str) -> Tunnel {
    let (left, right) = (Side::start(Host::Left, left), Side::start(Host::Right, right));
    right.befriend(&left, None);
    left.befriend(&right, Some(&endpoint.replace("PORT", &right.port.to_string())));
    Tunnel { left, right }
}
