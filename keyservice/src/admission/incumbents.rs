//! The memory of admissions on disk: a versioned JSON file, mode 0600.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Incumbent, Incumbents};
use crate::file::{self, Access, FileProblem};
use crate::key::PublicKey;

/// The version this code writes and reads.
const VERSION: u64 = 1;
/// Bytes such a file may have: some hundred a node.
const LIMIT: u64 = 64 * 1024 * 1024;

#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    nodes: &'a Incumbents,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    #[serde(rename = "version")]
    _version: u64,
    nodes: BTreeMap<String, Value>,
}

/// The file of incumbents cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("incumbents {}: {problem}{}", path.display(), aside.as_ref().map(|a| format!("; kept as {}", a.display())).unwrap_or_default())]
pub struct IncumbentsError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: IncumbentsProblem,
    /// Where it was moved, so that the next store does not overwrite it.
    pub aside: Option<PathBuf>,
}

/// What is wrong with a file of incumbents.
#[derive(Debug, thiserror::Error)]
pub enum IncumbentsProblem {
    /// It cannot be read or written, or others could have written it.
    #[error(transparent)]
    File(#[from] FileProblem),
    /// Not what we write.
    #[error("{field}: {problem}")]
    Content {
        /// The field, `nodes.NAME` for one of a node.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

fn content(field: impl Into<String>, problem: impl ToString) -> IncumbentsProblem {
    IncumbentsProblem::Content { field: field.into(), problem: problem.to_string() }
}

impl Incumbents {
    /// Reads the memory; empty when there is no file.
    ///
    /// A file that is corrupt, of another version or open to others is moved to `<path>.corrupt` (taking
    /// the place of an earlier one): the caller may report the error and go on with an empty memory.
    pub fn load(path: &Path) -> Result<Self, IncumbentsError> {
        let read = || -> Result<Self, IncumbentsProblem> {
            file::read(path, LIMIT, Access::Private)?
                .map_or_else(|| Ok(Self::default()), |bytes| Self::parse(&bytes))
        };
        read().map_err(|problem| {
            let unread = matches!(problem, IncumbentsProblem::File(FileProblem::Io { .. }));
            let aside = if unread { None } else { set_aside(path) };
            IncumbentsError { path: path.to_owned(), problem, aside }
        })
    }

    /// Writes the memory, atomically and mode 0600. Missing directories are made with mode 0700.
    pub fn store(&self, path: &Path) -> Result<(), IncumbentsError> {
        let write = || -> Result<(), IncumbentsProblem> {
            let written = Written { version: VERSION, nodes: self };
            let mut bytes = serde_json::to_vec_pretty(&written).map_err(|error| content("nodes", error))?;
            bytes.push(b'\n');
            file::ensure_dir(file::parent(path), 0o700)?;
            Ok(file::write(path, &bytes, 0o600)?)
        };
        write().map_err(|problem| IncumbentsError { path: path.to_owned(), problem, aside: None })
    }

    /// The memory in a file's content. No two nodes in it hold the same key or overlapping prefixes.
    pub fn parse(bytes: &[u8]) -> Result<Self, IncumbentsProblem> {
        // The version first: under another one the rest may look like anything.
        let value: Value = serde_json::from_slice(bytes).map_err(|error| content("file", error))?;
        let version = value.get("version").and_then(Value::as_u64);
        if version != Some(VERSION) {
            return Err(content("version", format!("is not {VERSION}, the only one this agent reads")));
        }
        let read: Read = serde_json::from_value(value).map_err(|error| content("file", error))?;
        let mut incumbents = Self::default();
        for (name, value) in read.nodes {
            let incumbent: Incumbent =
                serde_json::from_value(value).map_err(|error| content(format!("nodes.{name}"), error))?;
            incumbents.0.insert(name, incumbent);
        }
        incumbents.check()?;
        Ok(incumbents)
    }

    fn check(&self) -> Result<(), IncumbentsProblem> {
        let mut keys: BTreeMap<PublicKey, &str> = BTreeMap::new();
        let mut prefixes: Vec<(IpNet, &str)> = Vec::new();
        for (name, incumbent) in &self.0 {
            for key in &incumbent.keys {
                if let Some(other) = keys.insert(*key, name) {
                    return Err(content(
                        format!("nodes.{name}.keys"),
                        format!("{key} is in nodes.{other} too"),
                    ));
                }
            }
            for prefix in &incumbent.pod_cidrs {
                if prefix.trunc() != *prefix {
                    return Err(content(
                        format!("nodes.{name}.podCidrs"),
                        format!("{prefix} has host bits set"),
                    ));
                }
                prefixes.push((*prefix, name));
            }
        }
        // In this order a prefix that overlaps any earlier one overlaps the one before it.
        prefixes.sort_by_key(|(prefix, _)| (prefix.network(), prefix.prefix_len()));
        for pair in prefixes.windows(2) {
            let [(outer, other), (inner, name)] = pair else { continue };
            if outer.contains(inner) {
                let problem = format!("{inner} overlaps {outer} of nodes.{other}");
                return Err(content(format!("nodes.{name}.podCidrs"), problem));
            }
        }
        Ok(())
    }
}

fn set_aside(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(path);
    name.push(".corrupt");
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside).ok().map(|()| aside)
}
