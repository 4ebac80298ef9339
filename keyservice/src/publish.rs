//! Carrying announcements to the other nodes.

pub mod directory;
pub mod memory;

use std::path::PathBuf;

use crate::announcement::{Announcement, AnnouncementError};
use crate::file::FileProblem;

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// The others will see something new.
    Changed,
    /// It was there already; nothing was written.
    Unchanged,
}

/// Why an announcement was not published. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The name cannot be a Node's (RFC 1123 subdomain), so it names no file either.
    #[error("node name {0:?} is not a DNS-1123 subdomain of at most 253 characters")]
    Name(String),
    /// Every reader would refuse it.
    #[error("announcement of node {name}: {problem}")]
    Announcement {
        /// The node.
        name: String,
        /// What is wrong.
        problem: AnnouncementError,
    },
    /// A file cannot be read or written.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: FileProblem,
    },
    /// The file is there but is not the Node it should be; it is left as it is.
    #[error("{}: {problem}; move it away to let this node announce itself", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, naming the field.
        problem: String,
    },
}

/// A way to tell the other nodes. Synchronous: callers on a runtime use a blocking task.
pub trait Publish {
    /// Makes `announcement` what the others see of its node. Writes nothing when they see it already.
    fn publish(&mut self, announcement: &Announcement) -> Result<Published, PublishError>;

    /// Takes the announcement of `node` back.
    fn withdraw(&mut self, node: &str) -> Result<Published, PublishError>;
}

/// Refuses what no reader would accept.
fn check(announcement: &Announcement) -> Result<(), PublishError> {
    check_name(&announcement.name)?;
    announcement
        .validate()
        .map_err(|problem| PublishError::Announcement { name: announcement.name.clone(), problem })
}

/// RFC 1123 subdomain as Kubernetes checks it: labels of `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, joined by dots.
fn check_name(name: &str) -> Result<(), PublishError> {
    let alphanumeric = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let label = |label: &str| {
        let bytes = label.as_bytes();
        alphanumeric(bytes.first())
            && alphanumeric(bytes.last())
            && bytes.iter().all(|b| *b == b'-' || alphanumeric(Some(b)))
    };
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(())
    } else {
        Err(PublishError::Name(name.to_owned()))
    }
}
