//! From a file's text to Kubernetes objects: several YAML documents or one JSON value, lists expanded.

use serde::Deserialize;
use serde_json::Value;

use super::decode::{self, Decoded, Kind};

/// Most objects taken from one file.
pub const MAX_OBJECTS: usize = 100_000;
/// Deepest nesting of values and lists.
const MAX_DEPTH: usize = 64;

/// Something in a file that is no object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProblem {
    /// Line in the file, from 1; 0 when there is none to name.
    pub line: u64,
    /// A CamelCase word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Objects may be missing because of it, so those read before must stay.
    pub incomplete: bool,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Manifests {
    /// Its objects of the kinds we know.
    pub objects: Vec<Decoded>,
    /// What is wrong with it.
    pub problems: Vec<FileProblem>,
}

/// Reads YAML (`.yaml`, `.yml`), one document after the other: a broken one does not hide the others.
pub fn read_yaml(text: &str) -> Manifests {
    let mut out = Manifests::default();
    for (line, document) in documents(text) {
        let head: Option<Head> = match yaml(document) {
            Ok(head) => head,
            Err((at, message)) => {
                out.problem(if at == 0 { line } else { line + at - 1 }, "Unparsable", message, true);
                continue;
            }
        };
        // A document of nothing but comments is null.
        let Some(head) = head else { continue };
        if let Some(wanted) = out.wanted(line, &head) {
            match yaml::<Value>(document) {
                Ok(value) => out.take(line, wanted, &value, 0),
                Err((at, message)) => out.problem(line + at.saturating_sub(1), "Unparsable", message, true),
            }
        }
    }
    out
}

/// Reads JSON (`.json`).
pub fn read_json(text: &str) -> Manifests {
    let mut out = Manifests::default();
    let head = serde_json::from_str::<Option<Head>>(text);
    match head {
        Ok(None) => {}
        Ok(Some(head)) => {
            if let Some(wanted) = out.wanted(1, &head) {
                match serde_json::from_str::<Value>(text) {
                    Ok(value) => out.take(1, wanted, &value, 0),
                    Err(error) => out.problem(error.line() as u64, "Unparsable", error.to_string(), true),
                }
            }
        }
        Err(error) => out.problem(error.line() as u64, "Unparsable", error.to_string(), true),
    }
    out
}

/// Everything a file says, document by document, of whatever kind; `None` when a part cannot be read.
pub(crate) fn values(text: &str, json: bool) -> Option<Vec<Value>> {
    match json {
        true => serde_json::from_str(text).ok().map(|value| vec![value]),
        false => documents(text).into_iter().map(|(_, document)| yaml(document).ok()).collect(),
    }
}

/// All of a manifest that is read before we know that it concerns us: of a Secret nothing else ever is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
}

/// What to do with a manifest.
enum Wanted {
    /// Whose items are of this apiVersion and kind, unless they say otherwise.
    List(Option<(String, String)>),
    Object(Kind),
    /// Of one of our kinds in a version we do not read; with the reason.
    Refused(Kind, String),
}

impl Manifests {
    fn problem(&mut self, line: u64, reason: &'static str, message: String, incomplete: bool) {
        self.problems.push(FileProblem { line, reason, message: one_line(&message), incomplete });
    }

    fn wanted(&mut self, line: u64, head: &Head) -> Option<Wanted> {
        let (Some(api_version), Some(kind)) = (&head.api_version, &head.kind) else {
            let message = "not a manifest: apiVersion or kind is missing".to_owned();
            self.problem(line, "NotAManifest", message, true);
            return None;
        };
        if api_version == "v1" && kind == "List" {
            return Some(Wanted::List(None));
        }
        if let Some(item) = kind.strip_suffix("List")
            && let Ok(Some(_)) = Kind::of(api_version, item)
        {
            return Some(Wanted::List(Some((api_version.clone(), item.to_owned()))));
        }
        match Kind::of(api_version, kind) {
            Ok(Some(kind)) => Some(Wanted::Object(kind)),
            Ok(None) => {
                tracing::debug!(api_version, kind, "manifest of a kind that is not ours");
                None
            }
            Err(message) if kind == Kind::NetworkPolicy.name() => {
                Some(Wanted::Refused(Kind::NetworkPolicy, message))
            }
            Err(message) => {
                self.problem(line, "UnknownKind", message, false);
                None
            }
        }
    }

    fn take(&mut self, line: u64, wanted: Wanted, value: &Value, depth: usize) {
        if self.objects.len() >= MAX_OBJECTS {
            if self.problems.last().is_none_or(|last| last.reason != "TooManyObjects") {
                self.problem(line, "TooManyObjects", format!("more than {MAX_OBJECTS} objects"), true);
            }
            return;
        }
        match wanted {
            Wanted::Object(kind) => self.objects.push(decode::decode(kind, value)),
            Wanted::Refused(kind, why) => {
                // Its fields are likely the same, so that more of it can be told.
                let mut value = value.clone();
                if let Some(fields) = value.as_object_mut() {
                    fields.insert("apiVersion".to_owned(), kind.api_version().into());
                }
                let value = &value;
                let mut decoded = decode::decode(kind, value);
                decoded.problems.refuse("apiVersion", "UnknownVersion", why.clone());
                if let Some(decode::Object::Policy(policy)) = &mut decoded.object {
                    **policy = decode::network_policy::salvage(value, &decoded.key.reference(), &why);
                }
                self.objects.push(decoded);
            }
            Wanted::List(items) => self.take_list(line, items, value, depth),
        }
    }

    fn take_list(&mut self, line: u64, like: Option<(String, String)>, list: &Value, depth: usize) {
        let items = match list.get("items") {
            Some(Value::Array(items)) if depth < MAX_DEPTH => items,
            None | Some(Value::Null) => return,
            Some(_) => {
                self.problem(line, "NotAManifest", "items of a List is not a list".to_owned(), true);
                return;
            }
        };
        for item in items {
            let text = |field| item.get(field).and_then(Value::as_str).map(str::to_owned);
            let (api_version, kind) = like.clone().unzip();
            // An API server leaves these two out in lists of one kind.
            let mut item = item.clone();
            if let (Value::Object(fields), Some((api_version, kind))) = (&mut item, &like) {
                fields.entry("apiVersion").or_insert_with(|| api_version.as_str().into());
                fields.entry("kind").or_insert_with(|| kind.as_str().into());
            }
            let head = Head { api_version: text("apiVersion").or(api_version), kind: text("kind").or(kind) };
            if let Some(wanted) = self.wanted(line, &head) {
                self.take(line, wanted, &item, depth + 1);
            }
        }
    }
}

fn yaml<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, (u64, String)> {
    let options = serde_saphyr::options! {
        // A snippet of a Secret does not belong into a message.
        with_snippet: false,
        emit_comments: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_documents: 1,
            max_nodes: 2_000_000,
            max_aliases: 1_000,
        },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| (line_of(&error), without_place(&error)))
}

/// The line of a YAML error, from 1; 0 when it names none.
pub(crate) fn line_of(error: &serde_saphyr::Error) -> u64 {
    error.location().map_or(0, |location| location.line())
}

/// What a YAML error says, without the place within its document, which is not that in the file.
pub(crate) fn without_place(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Splits a YAML stream at its `---` and `...` lines, as kubectl does; with each document's first line.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut out = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let mut offset = 0;
    for (number, line) in (1u64..).zip(text.split_inclusive('\n')) {
        let marker = line.strip_prefix("---").or_else(|| line.strip_prefix("..."));
        let marker = marker.filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if let Some(rest) = marker {
            out.push((first_line, &text[start..offset]));
            // What follows `--- ` on its line already belongs to the next document.
            start = offset + line.len() - rest.len();
            first_line = number;
        }
        offset += line.len();
    }
    out.push((first_line, &text[start..]));
    // Directives (`%YAML 1.2`) stand before their `---`, so they make a piece of their own.
    let says_something = |piece: &str| {
        piece.trim_start_matches('\u{feff}').lines().any(|line| {
            let line = line.trim_end();
            !line.trim().is_empty() && !line.trim_start().starts_with('#') && !line.starts_with('%')
        })
    };
    out.retain(|(_, piece)| says_something(piece));
    out
}

/// A message on one line, with no more than it takes to find the place.
pub(crate) fn one_line(message: &str) -> String {
    let mut line: String = message.split_whitespace().collect::<Vec<_>>().join(" ");
    if let Some((at, _)) = line.char_indices().nth(300) {
        line.truncate(at);
        line.push('…');
    }
    line
}
