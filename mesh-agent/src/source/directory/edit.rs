//! Raises `spec.rotationEpoch` in the manifest that holds the MeshConfiguration, and changes nothing else in it.
//!
//! The text is edited, not written anew, so comments and order stay. Where in the text the field is, or belongs, is
//! guessed; the guess counts only if the result, read again, differs in that one field.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use serde_json::Value;
use zeroize::Zeroizing;

use super::scan::{self, Tree};
use crate::config::mesh;
use crate::files;
use crate::source::assemble::Entry;
use crate::source::decode::Kind;
use crate::source::manifest;

const FIELD: &str = "rotationEpoch";

/// Why the manifest was left as it is.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// Nothing to edit.
    #[error("no manifest below {} holds a MeshConfiguration that is in force", .0.display())]
    Missing(PathBuf),
    /// The system refused.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file, or the directory.
        path: PathBuf,
        /// With its errno.
        problem: io::Error,
    },
    /// No edit of the text has this effect and no other.
    #[error(
        "{}: cannot set spec.{FIELD} without a change to anything else; set it to {epoch} by hand",
        path.display()
    )]
    Odd {
        /// The file.
        path: PathBuf,
        /// What to set.
        epoch: u64,
    },
    /// Somebody else writes it.
    #[error("{}: has changed meanwhile; try again", .0.display())]
    Busy(PathBuf),
}

/// Sets `spec.rotationEpoch` of the MeshConfiguration below `root` to `epoch`. Gives the file.
pub fn raise_rotation_epoch(root: &Path, epoch: u64) -> Result<PathBuf, EditError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |problem| EditError::Io { path, problem }
    };
    let mut tree = Tree::new(root);
    tree.scan(true, &mut |_| {}).map_err(io(root))?;
    let place = place(&tree).ok_or_else(|| EditError::Missing(root.to_owned()))?;
    // What a link leads to is changed, not the link.
    let path = fs::canonicalize(root.join(&place)).map_err(io(&root.join(&place)))?;
    let before = scan::read_bounded(&path).map_err(io(&path))?;
    let json = path.extension().is_some_and(|extension| extension == "json");
    let odd = || EditError::Odd { path: path.clone(), epoch };
    let text = std::str::from_utf8(&before).map_err(|_| odd())?;
    let after = Zeroizing::new(edited(text, json, epoch).ok_or_else(odd)?);
    let metadata = fs::metadata(&path).map_err(io(&path))?;
    if scan::read_bounded(&path).map_err(io(&path))? != before {
        return Err(EditError::Busy(path));
    }
    let write = || {
        files::write_atomic(&path, after.as_bytes(), metadata.mode() & 0o777)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        let now = fs::metadata(&path)?;
        if (now.uid(), now.gid()) != (metadata.uid(), metadata.gid()) {
            chown(&path, Some(metadata.uid()), Some(metadata.gid()))?;
        }
        Ok(())
    };
    write().map_err(io(&path))?;
    Ok(path)
}

/// The file whose MeshConfiguration counts.
fn place(tree: &Tree) -> Option<String> {
    let mut files = tree.files().filter(|(place, objects)| Entry { place, objects }.announces().is_none());
    let found = files.find(|(_, file)| {
        file.objects.iter().any(|decoded| {
            decoded.key.kind == Kind::MeshConfiguration
                && decoded.key.name == mesh::NAME
                && decoded.object.is_some()
        })
    });
    found.map(|(place, _)| place.to_owned())
}

/// The text with the field set, and nothing else changed.
fn edited(text: &str, json: bool, epoch: u64) -> Option<String> {
    let mut wanted = manifest::values(text, json)?;
    let raised: usize = wanted.iter_mut().map(|value| raise(value, epoch)).sum();
    let does_it = |candidate: &String| {
        // Numbers are compared as numbers: `1e3` and `1000` are one.
        manifest::values(candidate, json).is_some_and(|values| values == wanted)
    };
    let mut candidates = replacements(text, epoch).chain(insertions(text, json, epoch));
    (raised == 1).then(|| candidates.find(does_it)).flatten()
}

/// Sets the field in every MeshConfiguration of this name in `value`; how many there are.
fn raise(value: &mut Value, epoch: u64) -> usize {
    if let Some(Value::Array(items)) = value.get_mut("items") {
        return items.iter_mut().map(|item| raise(item, epoch)).sum();
    }
    let is = |pointer: &str, wanted: &str| value.pointer(pointer).and_then(Value::as_str) == Some(wanted);
    if !is("/kind", Kind::MeshConfiguration.name()) || !is("/metadata/name", mesh::NAME) {
        return 0;
    }
    match value.get_mut("spec").and_then(Value::as_object_mut) {
        Some(spec) => {
            spec.insert(FIELD.to_owned(), epoch.into());
            1
        }
        None => 0,
    }
}

/// The text with another number behind each mention of the field.
fn replacements(text: &str, epoch: u64) -> impl Iterator<Item = String> {
    text.match_indices(FIELD).filter_map(move |(at, _)| {
        let value = at + FIELD.len() + after_colon(&text[at + FIELD.len()..])?;
        let digits = text[value..].bytes().take_while(u8::is_ascii_digit).count();
        (digits > 0).then(|| format!("{}{epoch}{}", &text[..value], &text[value + digits..]))
    })
}

/// The text with the field as the first in each `spec`.
fn insertions(text: &str, json: bool, epoch: u64) -> impl Iterator<Item = String> {
    const SPEC: &str = "spec";
    text.match_indices(SPEC).filter_map(move |(at, _)| {
        let value = at + SPEC.len() + after_colon(&text[at + SPEC.len()..])?;
        let rest = &text[value..];
        if let Some(inside) = rest.strip_prefix('{') {
            let blank = &inside[..inside.len() - inside.trim_start().len()];
            let comma = if inside[blank.len()..].starts_with('}') { "" } else { "," };
            let field = if json { format!("\"{FIELD}\"") } else { FIELD.to_owned() };
            let gap = if blank.is_empty() && !comma.is_empty() { " " } else { "" };
            return Some(format!("{}{{{blank}{field}: {epoch}{comma}{gap}{inside}", &text[..value]));
        }
        // The rest of the line is empty or a comment: the fields are on the next ones.
        let line = rest.split_inclusive('\n').next()?;
        if !(line.trim().is_empty() || line.starts_with('#')) || !line.ends_with('\n') {
            return None;
        }
        let below = value + line.len();
        let is_field = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        let first = text[below..].lines().find(is_field)?;
        let indent = &first[..first.len() - first.trim_start().len()];
        let end = if line.ends_with("\r\n") { "\r\n" } else { "\n" };
        Some(format!("{}{indent}{FIELD}: {epoch}{end}{}", &text[..below], &text[below..]))
    })
}

/// Bytes from the end of a key to its value on the same line: a closing quote, blanks and a colon.
fn after_colon(text: &str) -> Option<usize> {
    let unquoted = text.strip_prefix(['"', '\'']).unwrap_or(text);
    let value = unquoted.trim_start_matches([' ', '\t']).strip_prefix(':')?.trim_start_matches([' ', '\t']);
    Some(text.len() - value.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const BLOCK: &str = "# the mesh\napiVersion: margay.io/v1alpha1\nkind: MeshConfiguration\nmetadata:\n  name: default\nspec: # all of it\n  # ranges\n  pools:\n    - cidr: 10.0.0.0/8 # wide\n";

    fn whole(text: &str, edit: &str, json: bool) {
        let after = edited(text, json, 7).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(after, edit);
        // Once more is a replacement.
        assert_eq!(edited(&after, json, 8).unwrap(), edit.replace('7', "8"));
    }

    #[test]
    fn the_field_is_added_or_replaced_and_every_other_byte_stays() {
        whole(BLOCK, &BLOCK.replace("  # ranges", "  rotationEpoch: 7\n  # ranges"), false);
        let head =
            "apiVersion: margay.io/v1alpha1\r\nkind: MeshConfiguration\r\nmetadata: {name: default}\r\n";
        whole(
            &format!("{head}spec:\r\n    mtu: 1400\r\n"),
            &format!("{head}spec:\r\n    rotationEpoch: 7\r\n    mtu: 1400\r\n"),
            false,
        );
        whole(
            &format!("{head}spec: {{mtu: 1400}}\n"),
            &format!("{head}spec: {{rotationEpoch: 7, mtu: 1400}}\n"),
            false,
        );
        whole(&format!("{head}spec: {{}}"), &format!("{head}spec: {{rotationEpoch: 7}}"), false);
        whole(
            &format!("{head}\"spec\" :\n  \"rotationEpoch\" : 6 # six\n"),
            &format!("{head}\"spec\" :\n  \"rotationEpoch\" : 7 # six\n"),
            false,
        );
        // It may be on its line what stands elsewhere as text.
        let decoy = format!(
            "kind: Secret\napiVersion: v1\nstringData: {{x: 'rotationEpoch: 1'}}\nspec:\n  rotationEpoch: 2\n---\n{BLOCK}"
        );
        whole(&decoy, &decoy.replace("  # ranges", "  rotationEpoch: 7\n  # ranges"), false);
        let list = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [\n{\"kind\": \"MeshConfiguration\", \"metadata\": {\"name\": \"default\"}, \"spec\": {\n  \"pools\": []}}]}";
        whole(list, &list.replace("{\n  \"pools\"", "{\n  \"rotationEpoch\": 7,\n  \"pools\""), true);
    }

    #[test]
    fn what_cannot_be_edited_is_left() {
        let head = "apiVersion: margay.io/v1alpha1\nkind: MeshConfiguration\nmetadata: {name: default}\n";
        for text in [
            format!("{head}spec: &all\n  mtu: 1400\n"),
            format!("{head}spec:\n  rotationEpoch: 0x10\n"),
            format!("{head}spec:\n  <<: {{rotationEpoch: 3}}\n  mtu: 1\n...\n{head}spec: {{}}\n"),
            head.to_owned(),
            "spec: [".to_owned(),
        ] {
            assert_eq!(edited(&text, false, 7), None, "{text}");
        }
    }

    #[test]
    fn the_file_keeps_its_mode_and_its_link() {
        let root = tempfile::tempdir().unwrap();
        let missing = raise_rotation_epoch(root.path(), 7).unwrap_err().to_string();
        assert!(missing.contains("no manifest below"), "{missing}");
        fs::create_dir(root.path().join(".data")).unwrap();
        let target = root.path().join(".data/mesh.yaml");
        fs::write(&target, BLOCK).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&target, root.path().join("mesh.yaml")).unwrap();
        fs::write(root.path().join("other.yaml"), BLOCK).unwrap();
        assert_eq!(raise_rotation_epoch(root.path(), 7).unwrap(), target.canonicalize().unwrap());
        assert!(fs::read_to_string(&target).unwrap().contains("rotationEpoch: 7"));
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(fs::symlink_metadata(root.path().join("mesh.yaml")).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(root.path().join("other.yaml")).unwrap(), BLOCK, "it does not count");
        fs::write(&target, BLOCK.replace("spec: #", "spec: &x #")).unwrap();
        let odd = raise_rotation_epoch(root.path(), 8).unwrap_err().to_string();
        assert!(odd.contains("mesh.yaml") && odd.contains("by hand"), "{odd}");
    }

    proptest! {
        #[test]
        fn whatever_is_edited_reads_as_before_but_for_the_field(
            before in "(#[a-z ]{0,6}\n)?", indent in 1..5usize, mtu in 1280..2000u32, old in proptest::option::of(0..99u64),
            junk in "[a-z{}:#'\" -]{0,12}",
        ) {
            let pad = " ".repeat(indent);
            let old = old.map(|epoch| format!("{pad}rotationEpoch: {epoch}\n")).unwrap_or_default();
            let text = format!("{before}apiVersion: margay.io/v1alpha1\nkind: MeshConfiguration\nmetadata: {{name: default}}\nspec:\n{pad}mtu: {mtu}\n{old}{pad}mode: wireguard # {junk}\n");
            let after = edited(&text, false, 1234).unwrap();
            let mut values = manifest::values(&text, false).unwrap();
            prop_assert_eq!(raise(&mut values[0], 1234), 1);
            prop_assert_eq!(manifest::values(&after, false).unwrap(), values);
            let comment = format!("# {junk}\n");
            prop_assert!(after.contains(&comment));
        }

        #[test]
        fn no_text_brings_it_down(text in ".{0,80}", json: bool) {
            let _ = edited(&text, json, 1);
        }
    }
}
