//! Two hosts with a wire between them, and a contestant's daemons on them.
//!
//! ```text
//!   left  192.0.2.1 ── veth, MTU 1500 ── 192.0.2.2  right
//!         10.9.0.1     tunnel, MTU 1420   10.9.0.2
//! ```

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::contestant::{Contestant, Programs};
use crate::bench::cpu::Processes;
use crate::host::{Host, checked};
use crate::wait;

/// Name of each tunnel's interface.
pub const INTERFACE: &str = "wg0";
/// UDP port of each daemon.
pub const PORT: u16 = 51820;
/// For what should happen at once.
const PATIENCE: Duration = Duration::from_secs(15);

const DAEMON: &str = "daemon";

/// The hosts.
#[derive(Debug)]
pub struct Bed {
    /// Where load comes from.
    pub left: Host,
    /// Where servers are.
    pub right: Host,
    programs: Programs,
}

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Number 1.
    Left,
    /// Number 2.
    Right,
}

impl Side {
    /// On the wire.
    pub fn outer(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self as u8 + 1)
    }

    /// In the tunnel.
    pub fn inner(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 9, 0, self as u8 + 1)
    }
}

/// A key pair, as `wg` writes it.
#[derive(Clone)]
pub struct Keys {
    private: String,
    /// The public half, in base64.
    pub public: String,
}

impl Keys {
    /// New ones.
    pub fn generate() -> Result<Self> {
        let private = checked("wg genkey", Command::new("wg").arg("genkey").output().context("run wg")?)?;
        let mut child = Command::new("wg")
            .arg("pubkey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run wg")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(private.as_bytes()).context("write to wg pubkey")?;
        }
        let public = checked("wg pubkey", child.wait_with_output().context("wait for wg")?)?;
        Ok(Self { private: private.trim().into(), public: public.trim().into() })
    }
}

impl Bed {
    /// Makes the hosts and the wire.
    pub fn up(programs: &Programs) -> Result<Self> {
        let (left, right) = (Host::start("left", &programs.bins)?, Host::start("right", &programs.bins)?);
        left.netns().ip(&[format!(
            "link add wire mtu 1500 type veth peer name wire mtu 1500 netns {}",
            right.pid()
        )])?;
        for (host, side) in [(&left, Side::Left), (&right, Side::Right)] {
            host.netns()
                .ip(&[format!("addr add {}/24 dev wire", side.outer()), "link set wire up".into()])?;
        }
        Ok(Self { left, right, programs: programs.clone() })
    }

    /// One of the hosts.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::Left => &self.left,
            Side::Right => &self.right,
        }
    }

    /// Inodes of the hosts' network namespaces.
    pub fn namespaces(&self) -> Result<Vec<u64>> {
        [&self.left, &self.right].into_iter().map(|host| host.netns().inode()).collect()
    }

    /// Starts one side's daemon with an interface that has its address, and no peer yet. Returns its PID here.
    pub fn start_daemon(&self, side: Side, contestant: Contestant, keys: &Keys) -> Result<Option<i32>> {
        let Some(argv) = contestant.argv(INTERFACE, &self.programs)? else { return Ok(None) };
        let host = self.host(side);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        host.start_unit(DAEMON, &argv)?;
        let answers = wait::until(format!("{contestant} to answer"), PATIENCE, || {
            let (_, restarts) = host.unit(DAEMON)?;
            ensure!(restarts == 0, "it ended:\n{}", host.log(DAEMON));
            host.run(&["wg", "show", INTERFACE])?;
            Ok(Some(()))
        });
        answers.with_context(|| format!("{contestant} on {}: {}", host.name(), host.log(DAEMON)))?;
        host.write("/run/bench/key", keys.private.as_bytes())?;
        let port = PORT.to_string();
        host.run(&["wg", "set", INTERFACE, "private-key", "/run/bench/key", "listen-port", &port])?;
        host.netns().ip(&[
            format!("addr add {}/24 dev {INTERFACE}", side.inner()),
            format!("link set {INTERFACE} mtu 1420 up"),
        ])?;
        self.pid(side).map(Some)
    }

    /// The daemon's PID here.
    fn pid(&self, side: Side) -> Result<i32> {
        let host = self.host(side);
        let (inner, _) = host.unit(DAEMON)?;
        let inner = inner.context("the daemon has ended")?;
        let children = format!("/proc/{0}/task/{0}/children", host.pid());
        let children = std::fs::read_to_string(&children).with_context(|| children.clone())?;
        for child in children.split_whitespace() {
            let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            let names = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            if names.and_then(|names| names.split_whitespace().last()) == Some(inner.to_string().as_str()) {
                return child.parse().context("PID");
            }
        }
        bail!("process {inner} of {} is not among the children of its init", host.name())
    }

    /// Tells one side of the other.
    pub fn befriend(&self, side: Side, other: Side, public: &str) -> Result<()> {
        let allowed = format!("{}/32", other.inner());
        let endpoint = format!("{}:{PORT}", other.outer());
        let words = ["wg", "set", INTERFACE, "peer", public, "allowed-ips", &allowed, "endpoint", &endpoint];
        self.host(side).run(&words).map(drop)
    }

    /// Starts both daemons and waits until a ping comes back.
    pub fn start(&self, contestant: Contestant) -> Result<Tunnel<'_>> {
        let keys = [Keys::generate()?, Keys::generate()?];
        let mut pids = Vec::new();
        for (side, keys) in [Side::Left, Side::Right].into_iter().zip(&keys) {
            pids.extend(self.start_daemon(side, contestant, keys)?);
        }
        let tunnel = Tunnel { bed: self, contestant, daemons: Processes::new(&pids)?, pids };
        if !tunnel.pids.is_empty() {
            self.befriend(Side::Left, Side::Right, &keys[1].public)?;
            self.befriend(Side::Right, Side::Left, &keys[0].public)?;
        }
        let to = tunnel.address(Side::Right).to_string();
        wait::until(format!("a ping through {contestant}"), PATIENCE, || {
            self.left.run(&["ping", "-n", "-c", "1", "-W", "1", &to]).map(Some)
        })?;
        Ok(tunnel)
    }

    /// Ends both daemons and waits until their interfaces are gone.
    pub fn stop(&self) -> Result<()> {
        for host in [&self.left, &self.right] {
            if host.unit(DAEMON).is_ok_and(|(pid, _)| pid.is_some()) {
                host.stop_unit(DAEMON)?;
            }
            let interface = host.path(&format!("/sys/class/net/{INTERFACE}"));
            wait::until(format!("{INTERFACE} on {} to go", host.name()), PATIENCE, || {
                Ok((!interface.exists()).then_some(()))
            })?;
            // Some leave it behind, and the next one would take it for an answer.
            host.remove(&format!("/run/wireguard/{INTERFACE}.sock"))?;
        }
        Ok(())
    }
}

/// A contestant that runs. Its daemons end with [`Tunnel::stop`], or with the hosts.
#[derive(Debug)]
pub struct Tunnel<'a> {
    /// Where.
    pub bed: &'a Bed,
    /// Who.
    pub contestant: Contestant,
    /// Its daemons' clocks.
    pub daemons: Processes,
    /// Its daemons, as seen here: left, right.
    pub pids: Vec<i32>,
}

impl Tunnel<'_> {
    /// What reaches a side through the tunnel.
    pub fn address(&self, side: Side) -> Ipv4Addr {
        match self.contestant {
            Contestant::Veth => side.outer(),
            _ => side.inner(),
        }
    }

    /// Ends it; an error if a daemon ended before.
    pub fn stop(self) -> Result<()> {
        if !self.pids.is_empty() {
            for host in [&self.bed.left, &self.bed.right] {
                let (_, restarts) = host.unit(DAEMON)?;
                let name = host.name();
                ensure!(restarts == 0, "{} ended on {name}:\n{}", self.contestant, host.log(DAEMON));
            }
        }
        self.bed.stop()
    }
}
