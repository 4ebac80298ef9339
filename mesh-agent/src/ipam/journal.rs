//! The IPAM journal: one line per record, `<checksum> <json>`, only ever appended to, rewritten whole when
//! it has grown long. The checksum is the first 64 bits of SHA-256 over the JSON, which carries a sequence
//! number: a line that is missing, doubled, moved or changed shows.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::lease::{Key, Lease};
use crate::files::write_atomic;

/// In the state directory.
pub const FILE: &str = "ipam.journal";
/// Of the format.
const VERSION: u32 = 1;
/// Records beyond the needed ones that are worth a rewrite.
const SLACK: u64 = 1024;
/// Far more than a node's pods ever write between two rewrites.
const MAX_BYTES: u64 = 256 << 20;
const CHECKSUM_DIGITS: usize = 16;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk says no.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// With its errno.
        source: io::Error,
    },
    /// Written by a newer agent; it is left as it is.
    #[error("{path}: version {version} is not understood by this agent (it knows {VERSION})")]
    Version {
        /// The journal.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// Bigger than any journal of ours.
    #[error("{path}: {bytes} bytes, more than {MAX_BYTES}")]
    TooLong {
        /// The journal.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// An earlier write failed half-way and could not be undone.
    #[error(
        "{path}: an earlier write failed and could not be undone; restart the agent once the disk is well"
    )]
    Broken {
        /// The journal.
        path: PathBuf,
    },
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    /// First in every journal.
    Begin {
        /// Of the format.
        version: u32,
    },
    /// Addresses were promised.
    Lease(Lease),
    /// And given back.
    Release(Key),
    /// In a rewritten journal: free, in the order of their release.
    Freed(IpAddr),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Numbered {
    seq: u64,
    record: Record,
}

/// What the records amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// By key.
    pub leases: BTreeMap<Key, Lease>,
    /// Addresses given back, the longest free first.
    pub freed: Vec<IpAddr>,
}

/// A line that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct Damage {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// A journal read back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replayed {
    /// What its readable records amount to.
    pub state: State,
    /// What could not be read, a torn tail apart.
    pub damage: Vec<Damage>,
    /// Bytes before the torn tail.
    pub good: usize,
    /// Number of the last record.
    pub seq: u64,
    /// Where a damaged file was put.
    pub aside: Option<PathBuf>,
    version: Option<u32>,
}

/// Reads a journal's bytes. Total: whatever they are, there is an answer.
///
/// Bytes after the last line feed are a write that a crash cut short: its ADD was never answered, so they
/// are dropped. Whatever else is wrong is damage. A record after damage counts, since its own checksum
/// holds; where it contradicts what a lost one left, the newer wins.
pub fn replay(bytes: &[u8]) -> Replayed {
    let mut read = Replayed::default();
    let good = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    for (at, line) in bytes[..good].split_inclusive(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let damaged = |reason| Damage { line: at + 1, reason };
        match decode(line) {
            Ok(numbered) => {
                if numbered.seq <= read.seq {
                    read.damage.push(damaged("an older record in place of a newer"));
                    continue;
                }
                // Where a line is unreadable its number is missing too: one complaint is enough.
                if numbered.seq != read.seq + 1 && read.damage.is_empty() {
                    read.damage.push(damaged("records before it are missing"));
                }
                read.seq = numbered.seq;
                if let Err(reason) = read.apply(numbered.record)
                    && read.damage.is_empty()
                {
                    read.damage.push(damaged(reason));
                }
            }
            Err(reason) => read.damage.push(damaged(reason)),
        }
    }
    read.good = good;
    read
}

fn decode(line: &[u8]) -> Result<Numbered, &'static str> {
    let (sum, rest) = line.split_at_checked(CHECKSUM_DIGITS).ok_or("too short")?;
    let json = rest.strip_prefix(b" ").ok_or("no checksum")?;
    if sum != checksum(json).as_bytes() {
        return Err("wrong checksum");
    }
    serde_json::from_slice(json).map_err(|_| "not a record")
}

fn checksum(json: &[u8]) -> String {
    Sha256::digest(json).iter().take(CHECKSUM_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()
}

fn encode(seq: u64, record: Record) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(&Numbered { seq, record })?;
    let mut line = checksum(&json).into_bytes();
    line.push(b' ');
    line.extend_from_slice(&json);
    line.push(b'\n');
    Ok(line)
}

impl Replayed {
    fn apply(&mut self, record: Record) -> Result<(), &'static str> {
        let first = self.version.is_none();
        let mut sound = Ok(());
        match record {
            Record::Begin { version } => {
                if !first {
                    sound = Err("a second beginning");
                }
                self.version.get_or_insert(version);
                return sound;
            }
            Record::Lease(lease) => {
                let clashes: Vec<Key> = self
                    .state
                    .leases
                    .values()
                    .filter(|old| old.key() == lease.key() || old.ips.iter().any(|ip| lease.ips.contains(ip)))
                    .map(Lease::key)
                    .collect();
                for key in clashes {
                    sound = Err("a lease of what was not given back");
                    self.release(&key);
                }
                self.state.freed.retain(|ip| !lease.ips.contains(ip));
                self.state.leases.insert(lease.key(), lease);
            }
            Record::Release(key) => {
                if !self.release(&key) {
                    sound = Err("a release of what was not leased");
                }
            }
            Record::Freed(ip) => self.state.freed.push(ip),
        }
        if first { Err("no beginning") } else { sound }
    }

    fn release(&mut self, key: &Key) -> bool {
        let Some(lease) = self.state.leases.remove(key) else { return false };
        self.state.freed.retain(|ip| !lease.ips.contains(ip));
        self.state.freed.extend(lease.ips);
        true
    }
}

/// The open file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes that are whole records.
    length: u64,
    seq: u64,
    records: u64,
    broken: bool,
}

impl Journal {
    /// Opens or makes the journal in `directory`; a torn tail is cut off, a damaged file kept aside and
    /// replaced by its readable records.
    pub fn open(directory: &Path) -> Result<(Self, Replayed), JournalError> {
        let path = directory.join(FILE);
        let bytes = read(&path)?;
        let mut replayed = replay(&bytes);
        if let Some(version) = replayed.version.filter(|version| *version != VERSION) {
            return Err(JournalError::Version { path, version });
        }
        let fresh = replayed.seq == 0 && replayed.damage.is_empty();
        if !replayed.damage.is_empty() {
            replayed.aside = Some(keep_aside(&path)?);
        }
        let file = append_to(&path)?;
        let mut journal = Self {
            path,
            file,
            length: replayed.good as u64,
            seq: replayed.seq,
            records: replayed.seq,
            broken: false,
        };
        if fresh || replayed.aside.is_some() {
            journal.rewrite(replayed.state.leases.values(), replayed.state.freed.iter().copied())?;
        } else {
            journal.cut().map_err(|source| journal.io("cannot cut the torn tail of", source))?;
        }
        Ok((journal, replayed))
    }

    /// Adds a record; on return it is on disk. After an error it is not there.
    pub fn append(&mut self, record: Record) -> Result<(), JournalError> {
        if self.broken {
            return Err(JournalError::Broken { path: self.path.clone() });
        }
        let written = encode(self.seq + 1, record).and_then(|line| {
            self.file.write_all(&line)?;
            self.file.sync_data()?;
            Ok(line.len())
        });
        match written {
            Ok(length) => {
                self.length += length as u64;
                self.seq += 1;
                self.records += 1;
                Ok(())
            }
            Err(source) => {
                self.broken = self.cut().is_err();
                Err(self.io("cannot write", source))
            }
        }
    }

    /// Whether a rewrite would shorten it well, `needed` records being of use.
    pub fn is_long(&self, needed: usize) -> bool {
        self.records > 2 * needed as u64 + SLACK
    }

    /// Replaces it by one that says only this. Crash-safe: temporary file, sync, rename.
    pub fn rewrite<'a>(
        &mut self,
        leases: impl Iterator<Item = &'a Lease>,
        freed: impl Iterator<Item = IpAddr>,
    ) -> Result<(), JournalError> {
        let begin = std::iter::once(Record::Begin { version: VERSION });
        let records = begin.chain(freed.map(Record::Freed)).chain(leases.cloned().map(Record::Lease));
        let mut bytes = Vec::new();
        let mut seq = 0;
        for record in records {
            seq += 1;
            bytes.extend(encode(seq, record).map_err(|source| self.io("cannot encode", source))?);
        }
        write_atomic(&self.path, &bytes, 0o600).map_err(|source| self.io("cannot rewrite", source))?;
        // From here on the old descriptor writes to a file without a name.
        self.broken = true;
        self.file = append_to(&self.path)?;
        self.broken = false;
        (self.length, self.seq, self.records) = (bytes.len() as u64, seq, seq);
        Ok(())
    }

    fn cut(&mut self) -> io::Result<()> {
        if self.file.metadata()?.len() > self.length {
            self.file.set_len(self.length)?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn io(&self, what: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { what, path: self.path.clone(), source }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, JournalError> {
    let failed = |source| JournalError::Io { what: "cannot read", path: path.to_owned(), source };
    let bytes = match std::fs::metadata(path) {
        Ok(about) => about.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    if bytes > MAX_BYTES {
        return Err(JournalError::TooLong { path: path.to_owned(), bytes });
    }
    std::fs::read(path).map_err(failed)
}

fn append_to(path: &Path) -> Result<File, JournalError> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(|source| JournalError::Io {
        what: "cannot open",
        path: path.to_owned(),
        source,
    })
}

/// A second name for the damaged file, so that it is there whenever we crash.
fn keep_aside(path: &Path) -> Result<PathBuf, JournalError> {
    let mut number = 1u32;
    loop {
        let aside = path.with_extension(format!("journal.damaged.{number}"));
        match std::fs::hard_link(path, &aside) {
            Ok(()) => return Ok(aside),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 1000 => number += 1,
            Err(source) => return Err(JournalError::Io { what: "cannot keep aside", path: aside, source }),
        }
    }
}
