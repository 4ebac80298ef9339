//! Network configuration lists: ours, others', and ours made from another's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::PLUGIN;

/// Marks a list as installed by us. libcni passes over keys that it does not know.
const MARK: &str = "margay.io/installed-by";
/// In a list made from another's: that one's file name.
const SOURCE: &str = "margay.io/chained-behind";
/// Extensions that libcni reads.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// A list to be installed.
#[derive(Debug)]
pub(super) struct Conflist {
    /// Its file's name.
    pub(super) name: String,
    /// Its file's content, marked.
    pub(super) bytes: Vec<u8>,
    list: Value,
}

impl Conflist {
    /// The list in `file`, which must have our plugin.
    pub(super) fn own(file: &Path) -> anyhow::Result<Self> {
        let place = file.display();
        let name = file_name(file)?;
        let list = read(file)?;
        check(&list).with_context(|| format!("{place}"))?;
        if !names(&list, PLUGIN) {
            bail!("{place}: plugins: no {PLUGIN:?} among them");
        }
        Ok(Self::marked(name, list))
    }

    /// The list of another CNI with our plugin behind its own.
    pub(super) fn chained(file: &Path) -> anyhow::Result<Self> {
        let place = file.display();
        let source = file_name(file)?;
        let mut list = read(file)?;
        if list.get("plugins").is_none() && list.get("type").is_some() {
            list = as_list(list);
        }
        check(&list).with_context(|| format!("{place}"))?;
        if list.get(MARK).is_some() || names(&list, PLUGIN) {
            bail!("{place}: has {PLUGIN:?} already, there is nothing to chain behind");
        }
        if let Some(plugins) = list.get_mut("plugins").and_then(Value::as_array_mut) {
            plugins.push(json!({"type": PLUGIN, "chained": true}));
        }
        list[SOURCE] = json!(source);
        let name = chained_name(&source);
        if name >= source {
            bail!("{place}: no name of ours sorts before {source:?}");
        }
        Ok(Self::marked(name, list))
    }

    fn marked(name: String, mut list: Value) -> Self {
        list[MARK] = json!(PLUGIN);
        let bytes = format!("{list:#}\n").into_bytes();
        Self { name, bytes, list }
    }

    /// The types of its plugins.
    pub(super) fn plugins(&self) -> impl Iterator<Item = &str> {
        types(&self.list)
    }
}

/// `05-margay-flannel.conflist` for `10-flannel.conflist`.
fn chained_name(source: &str) -> String {
    let stem = source.rsplit_once('.').map_or(source, |(stem, _)| stem);
    let bare = stem.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(['-', '_']);
    format!("05-margay-{}.conflist", if bare.is_empty() { stem } else { bare })
}

/// A single plugin's configuration as a list of one.
fn as_list(mut plugin: Value) -> Value {
    let mut list = json!({});
    for key in ["cniVersion", "name", "disableCheck"] {
        if let Some(value) = plugin.as_object_mut().and_then(|fields| fields.remove(key)) {
            list[key] = value;
        }
    }
    list["plugins"] = json!([plugin]);
    list
}

fn file_name(file: &Path) -> anyhow::Result<String> {
    let name = file.file_name().with_context(|| format!("{}: has no file name", file.display()))?;
    let name = name.to_str().with_context(|| format!("{}: is not UTF-8", file.display()))?;
    match EXTENSIONS.iter().any(|extension| name.ends_with(&format!(".{extension}"))) {
        true => Ok(name.to_owned()),
        false => bail!("{}: runtimes read .conf, .conflist and .json only", file.display()),
    }
}

fn read(file: &Path) -> anyhow::Result<Value> {
    let bytes = fs::read(file).with_context(|| format!("{}", file.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}", file.display()))
}

/// A list that a runtime would take.
fn check(list: &Value) -> anyhow::Result<()> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).is_some_and(|text| !text.is_empty());
    if !text(list.get("name")) {
        bail!("name: is missing");
    }
    let plugins = list.get("plugins").and_then(Value::as_array).context("plugins: is missing, or no list")?;
    if plugins.is_empty() {
        bail!("plugins: is empty");
    }
    for (index, plugin) in plugins.iter().enumerate() {
        if !text(plugin.get("type")) {
            bail!("plugins[{index}].type: is missing");
        }
        // It becomes a path below the plugins' directory.
        if types(list).nth(index).is_none_or(|name| name.contains('/') || name.starts_with('.')) {
            bail!("plugins[{index}].type: is not a plugin's name");
        }
    }
    Ok(())
}

fn types(list: &Value) -> impl Iterator<Item = &str> {
    let plugins = list.get("plugins").and_then(Value::as_array).into_iter().flatten();
    plugins.map(|plugin| plugin.get("type").and_then(Value::as_str).unwrap_or_default())
}

fn names(list: &Value, plugin: &str) -> bool {
    types(list).chain(list.get("type").and_then(Value::as_str)).any(|name| name == plugin)
}

/// Whether a file's content is a list that we installed.
pub(super) fn is_ours(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Value>(bytes).is_ok_and(|list| list.get(MARK).is_some())
}

/// The configurations in a directory, in the order in which runtimes look at them.
fn all_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let context = || format!("{}", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.is_file() && path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known)) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// What we installed there.
pub(super) fn ours_in(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let all = all_in(directory)?.into_iter();
    Ok(all.filter(|path| fs::read(path).is_ok_and(|bytes| is_ours(&bytes))).collect())
}

/// File names of the configurations that have `plugin`.
pub(super) fn naming(directory: &Path, plugin: &str) -> anyhow::Result<Vec<String>> {
    let all = all_in(directory)?.into_iter().filter(|path| read(path).is_ok_and(|list| names(&list, plugin)));
    Ok(all.map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect())
}

/// The one that runtimes take instead of `name`, if there is one.
pub(super) fn first_before(directory: &Path, name: &str) -> anyhow::Result<Option<String>> {
    let first = all_in(directory)?.into_iter().next();
    let first = first.map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    Ok(first.filter(|first| first != name))
}
