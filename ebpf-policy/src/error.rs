//! What can go wrong at the kernel's edge.

use std::io;
use std::path::{Path, PathBuf};

use aya::EbpfError;
use aya::maps::MapError;
use aya::pin::PinError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;

/// Why the enforcer could not do what was asked. Enforcement that was in place stays in place unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a path failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The pin directory is not on a BPF file system.
    #[error("{} is not on a BPF file system (mount -t bpf bpf /sys/fs/bpf)", .0.display())]
    NotBpffs(PathBuf),
    /// A pinned map is not what this version needs; nothing was touched. [`crate::Options::replace_incompatible`] makes new ones.
    #[error("pinned map {}: {field} is {found}, this version needs {wanted}", path.display())]
    Incompatible {
        /// The pinned map.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// As pinned.
        found: u64,
        /// As needed.
        wanted: u64,
    },
    /// The BPF object cannot be read.
    #[error("BPF object: {0}")]
    Object(String),
    /// The object or its maps cannot be loaded.
    #[error("cannot load the BPF object: {0}")]
    Load(#[source] Box<EbpfError>),
    /// The kernel refuses a program.
    #[error("cannot load BPF program {program}: {source}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why.
        source: Box<ProgramError>,
    },
    /// An operation on a map failed.
    #[error("cannot {what} {name}: {source}")]
    Map {
        /// What was tried.
        what: &'static str,
        /// The map.
        name: String,
        /// Why.
        source: Box<MapError>,
    },
    /// Pinning failed.
    #[error("cannot pin {}: {source}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        source: Box<PinError>,
    },
    /// There is no such device.
    #[error("device {ifname}: {source}")]
    Device {
        /// Its name.
        ifname: String,
        /// Why.
        source: io::Error,
    },
    /// A program cannot be attached to, replaced on or taken from a device.
    #[error("program {program} on {ifname}: {source}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The device.
        ifname: String,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A link cannot be opened.
    #[error("link of {program} on {ifname}: {source}")]
    Link {
        /// The program.
        program: &'static str,
        /// The device.
        ifname: String,
        /// Why.
        source: Box<LinkError>,
    },
    /// New policy could not be put into the maps: every pod it concerns is closed until an apply succeeds.
    #[error("policy not applied, {closed} endpoints closed: {source}")]
    Closed {
        /// How many endpoints were closed.
        closed: usize,
        /// Why.
        source: Box<Error>,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { what, path: path.as_ref().to_owned(), source }
    }

    pub(crate) fn map(what: &'static str, name: &str, source: MapError) -> Self {
        Self::Map { what, name: name.to_owned(), source: Box::new(source) }
    }

    pub(crate) fn attach(program: &'static str, ifname: &str, source: ProgramError) -> Self {
        Self::Attach { program, ifname: ifname.to_owned(), source: Box::new(source) }
    }

    pub(crate) fn link(program: &'static str, ifname: &str) -> impl FnOnce(LinkError) -> Self {
        let ifname = ifname.to_owned();
        move |source| Self::Link { program, ifname, source: Box::new(source) }
    }
}
