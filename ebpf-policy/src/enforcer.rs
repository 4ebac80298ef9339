//! The programs and maps in the kernel: load or adopt, attach, apply, observe, take away.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::compile::Compiled;
use crate::model::{Direction, PodRef, RuleName};

/// Where programs are attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// TCX where the kernel has it (6.6 and newer), else clsact.
    #[default]
    Auto,
    /// TCX links only.
    Tcx,
    /// A clsact qdisc with direct-action filters.
    Clsact,
}

/// How to open the enforcer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Directory on a bpffs for pins; made with mode 0700.
    pub pin_dir: PathBuf,
    /// How programs are attached.
    pub attach: AttachMode,
}

impl Options {
    /// Pins under `pin_dir`, everything else by default.
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        Self { pin_dir: pin_dir.into(), attach: AttachMode::Auto }
    }
}

/// Why the enforcer could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a path failed.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// What [`Enforcer::apply`] changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Map entries written.
    pub written: usize,
    /// Map entries removed.
    pub removed: usize,
}

/// A device that our programs are attached to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attached {
    /// Index of the device.
    pub ifindex: u32,
    /// Its present name.
    pub ifname: String,
    /// Whether it is the tunnel device (else a pod's veth).
    pub tunnel: bool,
}

/// A packet that was denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: SystemTime,
    /// Device of the endpoint that judged.
    pub ifindex: u32,
    /// The pod behind it, if known.
    pub pod: Option<PodRef>,
    /// Direction seen from that pod.
    pub direction: Direction,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, or 0.
    pub source_port: u16,
    /// Destination port, or 0; for ICMP type × 256 + code.
    pub destination_port: u16,
    /// Short name of the reason, as in metrics, e.g. `default_deny`.
    pub reason: &'static str,
    /// The policies (`namespace/name`) that isolate the endpoint in this direction and do not allow the packet.
    pub policies: Vec<String>,
    /// The rule that decided, if one did.
    pub rule: Option<RuleName>,
}

/// Packets and bytes of one endpoint, direction and reason, summed over CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// Device of the endpoint.
    pub ifindex: u32,
    /// The pod behind it, if known.
    pub pod: Option<PodRef>,
    /// Direction seen from the pod; ingress at the tunnel device.
    pub direction: Direction,
    /// Whether these packets passed.
    pub allowed: bool,
    /// Short name of the reason.
    pub reason: &'static str,
    /// Packets.
    pub packets: u64,
    /// Bytes, headers included.
    pub bytes: u64,
}

/// The stream of denied packets.
#[derive(Debug)]
pub struct Events {}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        -1
    }
}

impl Events {
    /// The next event, if there is one; never blocks. Poll the descriptor for readability in between.
    pub fn next_event(&mut self, names: &Compiled) -> Option<Event> {
        let _ = names;
        None
    }
}

/// The programs and maps of this node.
#[derive(Debug)]
pub struct Enforcer {}

impl Enforcer {
    /// Loads programs and maps and pins them, or adopts what an earlier agent pinned.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let _ = options;
        Ok(Self {})
    }

    /// Whether maps of an earlier agent were adopted.
    pub fn adopted(&self) -> bool {
        false
    }

    /// Attaches both directions to a pod's host-side veth. Until [`Self::apply`] knows the endpoint, it is closed.
    pub fn attach_pod(&mut self, ifname: &str) -> Result<(), Error> {
        let _ = ifname;
        Ok(())
    }

    /// Attaches the source check to the tunnel device.
    pub fn attach_tunnel(&mut self, ifname: &str) -> Result<(), Error> {
        let _ = ifname;
        Ok(())
    }

    /// Takes our programs from a device; absent is success.
    pub fn detach(&mut self, ifname: &str) -> Result<(), Error> {
        let _ = ifname;
        Ok(())
    }

    /// Devices that carry our programs, whoever attached them.
    pub fn attached(&self) -> Result<Vec<Attached>, Error> {
        Ok(Vec::new())
    }

    /// Makes the maps hold exactly what was compiled, such that nothing is open in between.
    pub fn apply(&mut self, compiled: &Compiled) -> Result<ApplyReport, Error> {
        let _ = compiled;
        Ok(ApplyReport::default())
    }

    /// The stream of denied packets. One reader at a time.
    pub fn events(&self) -> Result<Events, Error> {
        Ok(Events {})
    }

    /// Denied packets that the event buffer had no room for.
    pub fn events_lost(&self) -> Result<u64, Error> {
        Ok(0)
    }

    /// Counters of every endpoint.
    pub fn counters(&self) -> Result<Vec<Counter>, Error> {
        Ok(Vec::new())
    }

    /// Detaches everything and removes every pin below `pin_dir`; absent is success.
    pub fn cleanup(pin_dir: &Path) -> Result<(), Error> {
        let _ = pin_dir;
        Ok(())
    }
}
