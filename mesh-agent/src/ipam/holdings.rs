//! On this node's disk: which addresses of IPPools are its own to give, and which machine it is.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_ipam::holdings::{Holdings, Identity, Ledger};

use crate::files::write_atomic;

const MODE: u32 = 0o600;

/// The holdings' file.
#[derive(Debug)]
pub struct HoldingsFile(PathBuf);

impl Ledger for HoldingsFile {
    fn save(&mut self, holdings: &Holdings) -> io::Result<()> {
        let bytes = holdings.encode().map_err(io::Error::other)?;
        write_atomic(&self.0, &bytes, MODE)
    }
}

impl HoldingsFile {
    /// The file with what is in it. One that is not there or cannot be read holds nothing: what is this node's is in the
    /// blocks, and the first round finds it there.
    pub fn open(path: PathBuf) -> io::Result<(Self, Holdings)> {
        let holdings = match std::fs::read(&path) {
            Ok(bytes) => Holdings::decode(&bytes).unwrap_or_else(|error| {
                tracing::warn!("{}: {error}; what is this node's is read from the blocks", path.display());
                Holdings::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Holdings::default(),
            Err(error) => return Err(error),
        };
        Ok((Self(path), holdings))
    }
}

/// Which machine this is: its name, and a number made at random once for a state directory.
pub fn identity(node: &str, path: &Path) -> io::Result<Identity> {
    let is_whole = |text: &&str| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let instance = match std::fs::read_to_string(path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let made = format!("{:032x}", rand::random::<u128>());
            write_atomic(path, made.as_bytes(), MODE)?;
            made
        }
        Err(error) => return Err(error),
    };
    match is_whole(&instance.as_str()) {
        true => Ok(Identity { node: node.to_owned(), instance }),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "does not hold 32 hexadecimal digits")),
    }
}

/// Which boot this is.
pub fn boot() -> io::Result<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|text| text.trim().to_owned())
}

/// Time since boot, suspension included (CLOCK_BOOTTIME, in hundredths of a second: proc(5), `/proc/uptime`).
pub fn since_boot() -> io::Result<Duration> {
    let text = std::fs::read_to_string("/proc/uptime")?;
    let seconds = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/uptime is not understood"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_state_directory_is_one_machine_for_good() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("instance");
        let first = identity("a", &path).unwrap();
        assert_eq!(identity("a", &path).unwrap(), first);
        let other = identity("a", &directory.path().join("other")).unwrap();
        assert_ne!(other.instance, first.instance);
        std::fs::write(&path, "half").unwrap();
        assert!(identity("a", &path).is_err());
    }

    #[test]
    fn what_was_saved_is_there_again_and_damage_holds_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("holdings");
        let (mut file, empty) = HoldingsFile::open(path.clone()).unwrap();
        assert_eq!(empty, Holdings::default());
        let mut holdings = Holdings { boot: "b".into(), ..Holdings::default() };
        holdings.addresses.insert("10.0.0.1".parse().unwrap(), "10.0.0.0/30".parse().unwrap());
        file.save(&holdings).unwrap();
        assert_eq!(HoldingsFile::open(path.clone()).unwrap().1, holdings);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(HoldingsFile::open(path).unwrap().1, Holdings::default());
        assert!(since_boot().unwrap() > Duration::ZERO && !boot().unwrap().is_empty());
    }
}
