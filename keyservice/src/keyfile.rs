//! The node's private key on disk: base64 and a newline as `wg genkey` writes it, mode 0600.
//!
//! The file is the node's identity, so it is made once and then never touched: whatever is wrong with
//! it is an error for a person to settle, not a reason to make a new one.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::file::{self, Access, FileProblem, Temp};
use crate::key::{KeyError, PrivateKey};

/// Base64 of 32 bytes, without the newline.
const TEXT_LEN: usize = 44;
/// A file longer than this is not a key; the slack lets a wrong length be told from a wrong file.
const LIMIT: u64 = 256;
/// Rounds of "not there, so make it" before giving up on whoever keeps removing it.
const ATTEMPTS: usize = 8;

/// A key file was refused or could not be made. Never holds the file's content.
#[derive(Debug, thiserror::Error)]
#[error("key file {}: {problem}", path.display())]
pub struct KeyFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: KeyFileProblem,
}

/// What is wrong with a key file.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileProblem {
    /// It cannot be read or written, or others could have.
    #[error(transparent)]
    File(#[from] FileProblem),
    /// Zero bytes: a full disk or a lost write, not a wish for a new identity.
    #[error("is empty; restore it, or remove it to give this node a new identity")]
    Empty,
    /// Not a key.
    #[error("{0}; restore it, or remove it to give this node a new identity")]
    Key(#[from] KeyError),
    /// Somebody removes the file as often as we make it.
    #[error("keeps vanishing while it is being made")]
    Vanishing,
}

/// Reads the key, or makes it where there is none. Several starters at once get the same key.
///
/// Missing directories are made with mode 0700.
pub fn load_or_create(path: &Path, rng: &mut impl rand::CryptoRng) -> Result<PrivateKey, KeyFileError> {
    for _ in 0..ATTEMPTS {
        if let Some(key) = load(path)? {
            // Only now: a racing starter whose file is swept away must find the key in its place.
            file::sweep(path);
            return Ok(key);
        }
        create(path, rng)
            .map_err(|problem| KeyFileError { path: path.to_owned(), problem: problem.into() })?;
    }
    Err(KeyFileError { path: path.to_owned(), problem: KeyFileProblem::Vanishing })
}

/// Reads the key; `None` when there is no file.
pub fn load(path: &Path) -> Result<Option<PrivateKey>, KeyFileError> {
    let read = || -> Result<Option<PrivateKey>, KeyFileProblem> {
        file::read(path, LIMIT, Access::Private)?.map(|bytes| parse(&bytes)).transpose()
    };
    read().map_err(|problem| KeyFileError { path: path.to_owned(), problem })
}

/// The key in a key file's content: 44 characters of base64 and at most one newline.
pub fn parse(content: &[u8]) -> Result<PrivateKey, KeyFileProblem> {
    if content.is_empty() {
        return Err(KeyFileProblem::Empty);
    }
    let line = content.strip_suffix(b"\n").unwrap_or(content);
    let text = std::str::from_utf8(line).map_err(|_| KeyError::Encoding("base64"))?;
    Ok(PrivateKey::from_base64(text)?)
}

fn create(path: &Path, rng: &mut impl rand::CryptoRng) -> Result<(), FileProblem> {
    file::ensure_dir(file::parent(path), 0o700)?;
    let mut content = Zeroizing::new([b'\n'; TEXT_LEN + 1]);
    let secret = PrivateKey::generate(rng).expose();
    STANDARD
        .encode_slice(secret.as_slice(), &mut content[..TEXT_LEN])
        .map_err(|error| FileProblem::Io { doing: "encode", source: std::io::Error::other(error) })?;
    // Whoever came first has made it; the caller reads theirs.
    Temp::write(path, content.as_slice(), 0o600)?.claim(path).map(|_| ())
}
