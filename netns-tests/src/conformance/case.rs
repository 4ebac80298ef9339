//! The case format: a JSON list of cases, plain or gzipped. `ns/pod`, `node:NAME` and `ext:NAME` are ends;
//! each step holds the full set of policies at its moment and the probes expected to get through or not.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::spec::{Namespace, Port, Protocol};

/// A case. Notes that change nothing (`source`, `tags`, `why`, …) are not kept.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// Unique name.
    pub name: String,
    /// `defined`, `convention`, `ambiguous` or `experimental`.
    #[serde(default)]
    pub status: Option<String>,
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// Nodes that the case names.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Hosts outside.
    #[serde(default)]
    pub externals: Vec<External>,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

/// A pod of a case.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Namespace.
    #[serde(rename = "ns")]
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its address; none for a pod that has not got one. Several are separated by commas.
    #[serde(default, deserialize_with = "addresses")]
    pub ip: Vec<IpAddr>,
    /// Where it listens.
    #[serde(default, deserialize_with = "ports")]
    pub ports: Vec<Port>,
    /// Its node; any of the lab's if not said.
    #[serde(default)]
    pub node: Option<String>,
    /// It shares its node's network.
    #[serde(default)]
    pub host_network: bool,
    /// Phase.
    #[serde(default)]
    pub phase: Option<String>,
    /// It is on its way out.
    #[serde(default)]
    pub deletion_timestamp: Option<String>,
}

impl Pod {
    /// Succeeded or Failed: its address is no longer its own.
    pub fn finished(&self) -> bool {
        matches!(self.phase.as_deref(), Some("Succeeded" | "Failed"))
    }
}

/// A node that a case names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Its address on the underlay.
    #[serde(deserialize_with = "addresses")]
    pub ip: Vec<IpAddr>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A host outside.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct External {
    /// Name.
    pub name: String,
    /// Its address.
    #[serde(deserialize_with = "addresses")]
    pub ip: Vec<IpAddr>,
}

/// One moment.
#[derive(Debug, Clone, Deserialize)]
pub struct Step {
    /// All policies there are.
    #[serde(deserialize_with = "policies")]
    pub policies: Vec<Value>,
    /// What gets through.
    pub expected: Vec<Expected>,
    /// Namespaces from now on, if they change.
    #[serde(default)]
    pub namespaces: Option<Vec<Namespace>>,
    /// Pods from now on, if they change.
    #[serde(default)]
    pub pods: Option<Vec<Pod>>,
}

/// `[src, dst, port, protocol, allowed]`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Expected(pub End, pub End, pub u16, pub Protocol, pub bool);

/// An end of a probe.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub enum End {
    /// Namespace and name.
    Pod(String, String),
    /// A node.
    Node(String),
    /// A host outside.
    External(String),
}

impl TryFrom<String> for End {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("node:") {
            return Ok(Self::Node(name.into()));
        }
        if let Some(name) = text.strip_prefix("ext:") {
            return Ok(Self::External(name.into()));
        }
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::Pod(namespace.into(), name.into()))
            }
            _ => Err(format!("{text:?} is no end of a probe (ns/pod, node:NAME or ext:NAME)")),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(namespace, name) => write!(f, "{namespace}/{name}"),
            Self::Node(name) => write!(f, "node:{name}"),
            Self::External(name) => write!(f, "ext:{name}"),
        }
    }
}

impl Case {
    /// Its verdict is not a promise of the API.
    pub fn is_open(&self) -> bool {
        matches!(self.status.as_deref(), Some("ambiguous" | "experimental"))
    }
}

/// Reads a file of cases; an error names the file and the case.
pub fn read(path: &Path) -> Result<Vec<Case>> {
    let what = || path.display().to_string();
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut text = Vec::new();
    if bytes.starts_with(&[0x1f, 0x8b]) {
        flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut text).with_context(what)?;
    } else {
        text = bytes;
    }
    parse(&text).with_context(what)
}

/// Parses the text of a file.
pub fn parse(text: &[u8]) -> Result<Vec<Case>> {
    let values: Vec<Value> = serde_json::from_slice(text).context("not a JSON list of cases")?;
    let mut names = std::collections::BTreeSet::new();
    let mut cases = Vec::with_capacity(values.len());
    for (index, value) in values.into_iter().enumerate() {
        let name = value["name"].as_str().unwrap_or("without a name").to_string();
        let case: Case = serde_json::from_value(value).with_context(|| format!("case {index} ({name})"))?;
        if !names.insert(case.name.clone()) {
            bail!("case {index}: the name {name:?} is there twice");
        }
        cases.push(case);
    }
    Ok(cases)
}

fn addresses<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<IpAddr>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        None(()),
        One(String),
        List(Vec<String>),
    }
    let list = match Form::deserialize(from)? {
        Form::None(()) => Vec::new(),
        Form::One(text) => {
            text.split(',').map(|part| part.trim().to_string()).filter(|part| !part.is_empty()).collect()
        }
        Form::List(list) => list,
    };
    list.iter()
        .map(|text| {
            text.parse().map_err(|_| serde::de::Error::custom(format!("ip: {text:?} is no IP address")))
        })
        .collect()
}

/// Objects that the lab can write to a file of their own; what they say is for the agent to judge.
fn policies<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Value>, D::Error> {
    let mut list = Vec::<Value>::deserialize(from)?;
    let mut keys = std::collections::BTreeSet::new();
    for (index, policy) in list.iter_mut().enumerate() {
        let wrong = |what: &str| serde::de::Error::custom(format!("policies[{index}]: {what}"));
        let kind = policy.get("kind").and_then(Value::as_str).ok_or_else(|| wrong("it has no kind"))?;
        let kind = kind.to_string();
        let metadata = policy.get_mut("metadata").and_then(Value::as_object_mut);
        let metadata = metadata.ok_or_else(|| wrong("it has no metadata"))?;
        let name = metadata.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| wrong("it has no metadata.name"))?.to_string();
        if kind == "NetworkPolicy" {
            // As an API server has it: every object of a namespaced kind says its namespace.
            metadata.entry("namespace").or_insert_with(|| "default".into());
        }
        let namespace = metadata.get("namespace").and_then(Value::as_str).unwrap_or_default().to_string();
        if !keys.insert((kind, namespace, name.clone())) {
            return Err(wrong(&format!("{name} is there twice")));
        }
    }
    Ok(list)
}

/// Ports may have notes beside what the lab needs, and `name` may be missing.
fn ports<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Port>, D::Error> {
    #[derive(Deserialize)]
    struct Loose {
        #[serde(default)]
        name: Option<String>,
        port: u16,
        #[serde(default)]
        protocol: Protocol,
        #[serde(default)]
        declared: Option<bool>,
    }
    let list = Vec::<Loose>::deserialize(from)?;
    Ok(list
        .into_iter()
        .map(|port| Port {
            name: port.name.unwrap_or_default(),
            port: port.port,
            protocol: port.protocol,
            declared: port.declared.unwrap_or(true),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = r#"[{"name": "n", "source": "s", "namespaces": [{"name": "x", "labels": {"a": ""}}],
        "pods": [{"ns": "x", "name": "a", "labels": {}, "ip": "10.0.0.1", "ports": [{"name": "", "port": 80, "protocol": "SCTP", "declared": false}]},
                 {"ns": "x", "name": "b", "labels": {}, "ip": null, "ports": [], "phase": "Failed", "hostNetwork": true}],
        "externals": [{"name": "w", "ip": "192.0.2.1"}],
        "steps": [{"policies": [], "expected": [["x/a", "ext:w", 80, "TCP", true], ["node:k", "x/a", 53, "UDP", false]]}]}]"#;

    #[test]
    fn every_kind_of_end_and_port_is_read() {
        let case = &parse(ONE.as_bytes()).unwrap()[0];
        assert_eq!(case.steps[0].expected[0].1, End::External("w".into()));
        assert_eq!(case.steps[0].expected[1].0.to_string(), "node:k");
        assert!(!case.pods[0].ports[0].declared && case.pods[1].ip.is_empty() && case.pods[1].finished());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, word) in [
            (r#""x/a", "ext:w""#, r#""xa", "ext:w""#, "xa"),
            ("10.0.0.1", "10.0.0.256", "10.0.0.256"),
            ("\"SCTP\"", "\"DCCP\"", "DCCP"),
            ("\"steps\"", "\"stops\"", "steps"),
            ("\"policies\": []", "\"policies\": [7]", "policies[0]"),
            ("\"policies\": []", r#""policies": [{"kind": "NetworkPolicy", "metadata": "m"}]"#, "metadata"),
        ] {
            let error = format!("{:#}", parse(ONE.replacen(from, to, 1).as_bytes()).unwrap_err());
            assert!(error.contains(word) && error.contains("case 0"), "{error}");
        }
    }

    #[test]
    fn gzip_is_read_as_well() {
        use std::io::Write;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cases.json.gz");
        let mut gz = flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), Default::default());
        gz.write_all(ONE.as_bytes()).unwrap();
        gz.finish().unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
    }
}
