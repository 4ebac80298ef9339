//! The pin directory: what is where, and whether it can be adopted.
//!
//! ```text
//! PIN_DIR/maps/NAME             the maps; present only once complete (made as maps_new, since bpffs allows no dots, and renamed)
//! PIN_DIR/links/PROGRAM-IFINDEX a TCX link
//! PIN_DIR/tc/PROGRAM-IFINDEX    the program of a clsact filter, as a mark that the filter is ours
//! PIN_DIR/host                  the link of the program for the host's sockets
//! ```

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aya::maps::MapData;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::error::Error;
use crate::object::{MapSpec, PROGRAMS};

/// The pin directory.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    root: PathBuf,
}

/// How a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Via {
    /// By a pinned TCX link.
    Tcx,
    /// By a filter on the clsact qdisc.
    Clsact,
}

/// A program on a device, as the pins say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Attachment {
    pub(crate) ifindex: u32,
    pub(crate) program: &'static str,
    pub(crate) via: Via,
}

impl Pins {
    /// Opens the directory, making it with mode 0700 if need be: a fresh bpffs is world-writable.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let pins = Self { root: root.to_owned() };
        for dir in [pins.root.clone(), pins.root.join("links"), pins.root.join("tc")] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(|source| Error::io("create", &dir, source))?;
        }
        fs::set_permissions(root, Permissions::from_mode(0o700))
            .map_err(|source| Error::io("set the mode of", root, source))?;
        let kind = statfs(root).map_err(|errno| Error::io("stat the file system of", root, errno.into()))?;
        if kind.filesystem_type() != BPF_FS_MAGIC {
            return Err(Error::NotBpffs(root.to_owned()));
        }
        Ok(pins)
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// An empty directory to make new maps in.
    pub(crate) fn staging(&self) -> Result<PathBuf, Error> {
        let staging = self.root.join("maps_new");
        remove_all(&staging)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&staging)
            .map_err(|source| Error::io("create", &staging, source))?;
        Ok(staging)
    }

    /// Puts complete new maps in the place of the old ones, if there are any.
    pub(crate) fn publish(&self, staging: &Path) -> Result<(), Error> {
        remove_all(&self.maps())?;
        fs::rename(staging, self.maps()).map_err(|source| Error::io("rename", staging, source))
    }

    /// Whether there are maps to adopt, and that each is as the object wants it.
    pub(crate) fn check(&self, wanted: &BTreeMap<String, MapSpec>) -> Result<bool, Error> {
        if !self.maps().try_exists().map_err(|source| Error::io("look for", self.maps(), source))? {
            return Ok(false);
        }
        for (name, wanted) in wanted {
            let path = self.map(name);
            let mismatch = |field, found: u64, wanted: u64| Error::Incompatible {
                path: path.clone(),
                field,
                found,
                wanted,
            };
            if !path.try_exists().map_err(|source| Error::io("look for", &path, source))? {
                return Err(mismatch("presence", 0, 1));
            }
            let map =
                MapData::from_pin(&path).map_err(|source| Error::map("open the pinned map", name, source))?;
            let info = map.info().map_err(|source| Error::map("inspect", name, source))?;
            let kind = info.map_type().map_err(|source| Error::map("inspect", name, source))? as u32;
            // The kernel adds to the flags of some types; what was asked for must be there.
            let flags = info.map_flags() & wanted.flags;
            for (field, found, wanted) in [
                ("type", kind, wanted.kind),
                ("key size", info.key_size(), wanted.key_size),
                ("value size", info.value_size(), wanted.value_size),
                ("max entries", info.max_entries(), wanted.max_entries),
                ("flags", flags, wanted.flags),
            ] {
                if found != wanted {
                    return Err(mismatch(field, found.into(), wanted.into()));
                }
            }
        }
        Ok(true)
    }

    pub(crate) fn attachment(&self, of: &Attachment) -> PathBuf {
        let dir = match of.via {
            Via::Tcx => "links",
            Via::Clsact => "tc",
        };
        self.root.join(dir).join(format!("{}-{}", of.program, of.ifindex))
    }

    pub(crate) fn host(&self) -> PathBuf {
        self.root.join("host")
    }

    /// Everything that is attached, in order of devices.
    pub(crate) fn attachments(&self) -> Result<Vec<Attachment>, Error> {
        let mut list = Vec::new();
        for (dir, via) in [("links", Via::Tcx), ("tc", Via::Clsact)] {
            let dir = self.root.join(dir);
            let entries = fs::read_dir(&dir).map_err(|source| Error::io("list", &dir, source))?;
            for entry in entries {
                let entry = entry.map_err(|source| Error::io("list", &dir, source))?;
                let name = entry.file_name();
                let parsed =
                    name.to_str().and_then(|name| name.rsplit_once('-')).and_then(|(program, index)| {
                        let program = PROGRAMS.iter().find(|known| **known == program)?;
                        Some(Attachment { ifindex: index.parse().ok()?, program, via })
                    });
                list.extend(parsed);
            }
        }
        list.sort();
        Ok(list)
    }

    /// Removes everything, the directory itself last.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        remove_all(&self.root)
    }
}

/// Removes a file; absent is success.
pub(crate) fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, source)),
        _ => Ok(()),
    }
}

fn remove_all(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, source)),
        _ => Ok(()),
    }
}
