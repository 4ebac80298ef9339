//! Who is compared: a program, how it is started, and its version.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Serialize, Serializer};

use crate::bins::{Bins, peers_dir};

/// A way for packets from one host to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contestant {
    /// No tunnel at all: what load generators and the kernel can do.
    Veth,
    /// mesh-datapath without encryption: what system calls and offloads cost.
    Null,
    /// mesh-datapath.
    Margay,
    /// mesh-datapath with every packet sealed by itself, by `ring`.
    MargayRing,
    /// Another build of mesh-datapath, to compare with.
    Other,
    /// The newest wireguard-go, what ratios are to.
    WireguardGo,
    /// boringtun-cli.
    Boringtun,
    /// gotatun-cli.
    Gotatun,
}

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Ours.
    pub bins: Bins,
    /// Of [`Contestant::Other`].
    pub other: Option<PathBuf>,
}

impl Contestant {
    /// All, in the order of the tables.
    pub const ALL: [Self; 8] = [
        Self::Veth,
        Self::Null,
        Self::Margay,
        Self::MargayRing,
        Self::Other,
        Self::WireguardGo,
        Self::Boringtun,
        Self::Gotatun,
    ];

    /// Its name in arguments, tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Veth => "veth",
            Self::Null => "null",
            Self::Margay => "margay",
            Self::MargayRing => "margay-ring",
            Self::Other => "other",
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun-cli",
            Self::Gotatun => "gotatun-cli",
        }
    }

    /// Whether it takes part unless somebody says otherwise.
    pub fn is_default(self) -> bool {
        !matches!(self, Self::MargayRing | Self::Other)
    }

    fn program(self) -> Option<&'static str> {
        match self {
            Self::Veth => None,
            Self::Null | Self::Margay | Self::MargayRing | Self::Other => Some("mesh-datapath"),
            Self::WireguardGo => Some("wireguard-go"),
            Self::Boringtun => Some("boringtun-cli"),
            Self::Gotatun => Some("gotatun"),
        }
    }

    /// The command that drives `interface` in the foreground; `None` without a tunnel.
    pub fn argv(self, interface: &str, programs: &Programs) -> Result<Option<Vec<String>>> {
        let Some(name) = self.program() else { return Ok(None) };
        let program = match (self, name) {
            (Self::Other, _) => programs.other.clone().context("other: give its path with --other")?,
            (_, "mesh-datapath") => programs.bins.program(name)?,
            // Debian's wireguard-go may be in the way: the one of `.ci/peers` is meant.
            _ => peers_dir().join(name),
        };
        if !program.is_file() {
            bail!("{}: {} is not there: run .ci/peers bench", self.name(), program.display());
        }
        let mut argv = ["env", "LOG_LEVEL=error", "WG_LOG_LEVEL=error"].map(str::to_owned).to_vec();
        match self {
            Self::Null => argv.push("MARGAY_NULL_CRYPTO=1".into()),
            Self::MargayRing => argv.push("MARGAY_CRYPTO=ring".into()),
            _ => {}
        }
        argv.push(program.to_string_lossy().into_owned());
        if matches!(self, Self::Boringtun | Self::Gotatun) {
            argv.push("--disable-drop-privileges".into());
        }
        argv.extend(["-f".into(), interface.to_owned()]);
        Ok(Some(argv))
    }

    /// Its program's version, or the kernel's.
    pub fn version(self, programs: &Programs) -> Result<String> {
        let Some(argv) = self.argv("wg0", programs)? else {
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
            return Ok(format!("Linux {}", release.trim()));
        };
        let program = argv.iter().find(|word| word.starts_with('/')).context("no program")?;
        if self == Self::WireguardGo
            && let Some(version) = go_module(program)?
        {
            return Ok(version);
        }
        let output = Command::new(program).arg("--version").output().with_context(|| program.clone())?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // `NAME VERSION`, whatever it calls itself.
        let version = text.lines().next().and_then(|line| line.split_whitespace().last());
        version.map(str::to_owned).with_context(|| format!("{program} --version says {text:?}"))
    }
}

/// The version that Go writes into every program: `path<TAB>version`.
fn go_module(program: &str) -> Result<Option<String>> {
    let bytes = std::fs::read(program).with_context(|| format!("read {program}"))?;
    let wanted = b"golang.zx2c4.com/wireguard\tv";
    let at = bytes.windows(wanted.len()).position(|window| window == wanted);
    Ok(at.and_then(|at| bytes.get(at + wanted.len() - 1..)).map(|rest| {
        let version = rest.iter().take_while(|byte| byte.is_ascii_graphic()).copied().collect();
        String::from_utf8(version).unwrap_or_default()
    }))
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Contestant {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| one.name() == name);
        found.ok_or_else(|| format!("one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl Serialize for Contestant {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
