//! Announcing in a directory of Kubernetes manifests: `nodes/<name>.margay.yaml`, a Node with annotations.
//!
//! The file belongs to the agent, but what others put into it stays: only our annotations are changed.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Publish, PublishError, Published, check, check_name};
use crate::announcement::{ANNOTATIONS, Announcement};
use crate::file::{self, Access};

/// Bytes such a file may have: Kubernetes allows 256 KiB of annotations per object.
const LIMIT: u64 = 1024 * 1024;

/// Announces in a manifest directory.
#[derive(Debug, Clone)]
pub struct DirectoryPublisher {
    manifests: PathBuf,
}

impl DirectoryPublisher {
    /// For the manifest directory; it is made, mode 0755, with the first announcement.
    pub fn new(manifests: impl Into<PathBuf>) -> Self {
        Self { manifests: manifests.into() }
    }

    /// The file that carries the announcement of `node`.
    pub fn path(&self, node: &str) -> Result<PathBuf, PublishError> {
        check_name(node)?;
        Ok(self.manifests.join("nodes").join(format!("{node}.margay.yaml")))
    }
}

impl Publish for DirectoryPublisher {
    fn publish(&mut self, announcement: &Announcement) -> Result<Published, PublishError> {
        check(announcement)?;
        let path = self.path(&announcement.name)?;
        let old = read(&path, &announcement.name)?;
        let mut new = old.clone().unwrap_or_else(|| empty_node(&announcement.name));
        let annotations = annotations(&path, &mut new)?;
        for (key, value) in announcement.to_annotations() {
            annotations.insert(key, Value::String(value));
        }
        if old.as_ref() == Some(&new) {
            return Ok(Published::Unchanged);
        }
        write(&path, &new)?;
        Ok(Published::Changed)
    }

    fn withdraw(&mut self, node: &str) -> Result<Published, PublishError> {
        let path = self.path(node)?;
        let Some(old) = read(&path, node)? else { return Ok(Published::Unchanged) };
        let mut new = old.clone();
        annotations(&path, &mut new)?.retain(|key, _| !ANNOTATIONS.contains(&key.as_str()));
        if new == empty_node(node) {
            let removed = std::fs::remove_file(&path).map_err(file::FileProblem::io("remove"));
            removed
                .and_then(|()| file::sync_dir(file::parent(&path)))
                .map_err(|problem| at(&path, problem))?;
        } else if new == old {
            return Ok(Published::Unchanged);
        } else {
            write(&path, &new)?;
        }
        Ok(Published::Changed)
    }
}

fn at(path: &Path, problem: file::FileProblem) -> PublishError {
    PublishError::File { path: path.to_owned(), problem }
}

fn empty_node(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "annotations": {} } })
}

/// The Node in the file; `None` without a file.
fn read(path: &Path, node: &str) -> Result<Option<Value>, PublishError> {
    let content = |problem: String| PublishError::Content { path: path.to_owned(), problem };
    let Some(bytes) = file::read(path, LIMIT, Access::Public).map_err(|problem| at(path, problem))? else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes).map_err(|error| content(error.to_string()))?;
    let value: Value = serde_saphyr::from_str(text).map_err(|error| content(error.to_string()))?;
    let expected = [("/apiVersion", "v1"), ("/kind", "Node"), ("/metadata/name", node)];
    for (pointer, want) in expected {
        let found = value.pointer(pointer).and_then(Value::as_str);
        if found != Some(want) {
            let field = pointer.trim_start_matches('/').replace('/', ".");
            return Err(content(format!(
                "{field} is {}, not {want:?}",
                found.map_or("no string".to_owned(), |f| format!("{f:?}"))
            )));
        }
    }
    Ok(Some(value))
}

/// `metadata.annotations`, made when missing.
fn annotations<'a>(path: &Path, node: &'a mut Value) -> Result<&'a mut Map<String, Value>, PublishError> {
    let field =
        |name| PublishError::Content { path: path.to_owned(), problem: format!("{name} is not a mapping") };
    let metadata =
        node.get_mut("metadata").and_then(Value::as_object_mut).ok_or_else(|| field("metadata"))?;
    let annotations = metadata.entry("annotations").or_insert(Value::Null);
    if annotations.is_null() {
        *annotations = Value::Object(Map::new());
    }
    annotations.as_object_mut().ok_or_else(|| field("metadata.annotations"))
}

fn write(path: &Path, node: &Value) -> Result<(), PublishError> {
    // One line a value: a folded JSON list is hard to read and to grep.
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    let yaml = serde_saphyr::to_string_with_options(node, options)
        .map_err(|error| PublishError::Content { path: path.to_owned(), problem: error.to_string() })?;
    let text = format!("# Written by mesh-agent: only its margay.io/ annotations are its own.\n{yaml}");
    file::ensure_dir(file::parent(path), 0o755)
        .and_then(|()| file::write(path, text.as_bytes(), 0o644))
        .map_err(|problem| at(path, problem))
}
