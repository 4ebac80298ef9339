//! The state directory: what is in it, and that one agent has it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Why the state directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process has it.
    #[error("another mesh-agent is running with the state directory {0}")]
    Taken(PathBuf),
    /// It cannot be made or locked.
    #[error("{path}: {source}")]
    Io {
        /// What it was about.
        path: PathBuf,
        /// With its errno.
        source: io::Error,
    },
}

/// The state directory, held until dropped.
#[derive(Debug)]
pub struct StateDir {
    root: PathBuf,
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes the directory (0700) if need be, and takes it.
    pub fn take(root: &Path) -> Result<Self, StateError> {
        let failed = |path: &Path, source| StateError::Io { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(|error| failed(root, error))?;
        let path = root.join("lock");
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        let file = file.map_err(|error| failed(&path, error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { root: root.to_owned(), _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(StateError::Taken(root.to_owned())),
            Err((_, errno)) => Err(failed(&path, errno.into())),
        }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The nodes admitted before.
    pub fn incumbents(&self) -> PathBuf {
        self.root.join("incumbents.json")
    }

    /// The secret that announcements are signed with.
    pub fn announcement_key(&self) -> PathBuf {
        self.root.join("announcement-key")
    }

    /// Where peers were last heard from.
    pub fn learned(&self) -> PathBuf {
        self.root.join("learned-endpoints.json")
    }

    /// What sysctls were before us.
    pub fn sysctls(&self) -> PathBuf {
        self.root.join("sysctls.json")
    }

    /// Removes everything in it: the next agent here is a new node. The directory stays, empty.
    pub fn purge(self) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_second_agent_is_refused_until_the_first_ends() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("margay");
        let first = StateDir::take(&root).unwrap();
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        let refused = StateDir::take(&root).unwrap_err().to_string();
        assert!(refused.contains("another mesh-agent") && refused.contains("margay"), "{refused}");
        drop(first);
        fs::write(root.join("key"), "k").unwrap();
        StateDir::take(&root).unwrap().purge().unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }
}
