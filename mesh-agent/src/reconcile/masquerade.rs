//! Source NAT for pods that talk to the world: the nftables table `inet margay`.
//!
//! The table is written as one transaction and compared, object by object, with what `nft -j` lists: the
//! same JSON both ways, so that a rule somebody added to or took from it is noticed.

use std::collections::BTreeSet;
use std::process::{Output, Stdio};

use futures::future::BoxFuture;
use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::{ReconcileError, Reconciler, Report, Stage};
use crate::desired::{Desired, Masquerade};

/// The table's name, in family `inet`.
pub const TABLE: &str = "margay";
const OBJECT: &str = "nftables table inet margay";

/// The table as `nft -j list table` shows it, without handles and counters and with sets in order; empty
/// when there is no such table.
pub type Actual = Vec<Value>;

/// One change.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Put this table in the place of whatever is there, atomically.
    Replace(Vec<Value>),
    /// Take the table away.
    Remove,
}

/// What to change.
pub fn diff(actual: &Actual, desired: &Desired) -> Vec<Op> {
    let wish = desired.masquerade.as_ref().map(objects);
    match wish {
        Some(wish) if wish != *actual => vec![Op::Replace(wish)],
        None if desired.prune && !actual.is_empty() => vec![Op::Remove],
        _ => Vec::new(),
    }
}

/// The table's objects in the order in which they are made and listed.
fn objects(wish: &Masquerade) -> Vec<Value> {
    let mut sets = Vec::new();
    let mut rules: Vec<Vec<Value>> = wish.internal_links.iter().map(|link| stay(link)).collect();
    for (family, protocol, kind) in [("4", "ip", "ipv4_addr"), ("6", "ip6", "ipv6_addr")] {
        let of_family = |prefixes: &BTreeSet<IpNet>| -> Vec<IpNet> {
            let all: Vec<IpNet> = prefixes
                .iter()
                .filter(|prefix| matches!(prefix, IpNet::V4(_)) == (family == "4"))
                .copied()
                .collect();
            // Intervals of a set must not overlap.
            IpNet::aggregate(&all)
        };
        let sources = of_family(&wish.sources);
        if sources.is_empty() {
            continue;
        }
        sets.push(set(&format!("sources{family}"), kind, &sources));
        sets.push(set(&format!("exceptions{family}"), kind, &of_family(&wish.exceptions)));
        rules.push(vec![
            compare("==", payload(protocol, "saddr"), json!(format!("@sources{family}"))),
            compare("!=", payload(protocol, "daddr"), json!(format!("@exceptions{family}"))),
            json!({ "masquerade": null }),
        ]);
    }
    let chain = json!({ "chain": {
        "family": "inet", "table": TABLE, "name": "postrouting",
        "type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept",
    }});
    let rules = rules.into_iter().map(
        |expr| json!({ "rule": { "family": "inet", "table": TABLE, "chain": "postrouting", "expr": expr } }),
    );
    let table = json!({ "table": { "family": "inet", "name": TABLE } });
    [table].into_iter().chain(sets).chain([chain]).chain(rules).map(normalise).collect()
}

/// What leaves by `link` keeps its source.
fn stay(link: &str) -> Vec<Value> {
    vec![compare("==", json!({ "meta": { "key": "oifname" } }), json!(link)), json!({ "return": null })]
}

fn compare(op: &str, left: Value, right: Value) -> Value {
    json!({ "match": { "op": op, "left": left, "right": right } })
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

fn set(name: &str, kind: &str, prefixes: &[IpNet]) -> Value {
    let element = |prefix: &IpNet| match prefix.prefix_len() == prefix.max_prefix_len() {
        true => json!(prefix.addr().to_string()),
        false => json!({ "prefix": { "addr": prefix.network().to_string(), "len": prefix.prefix_len() } }),
    };
    let mut set = json!({
        "family": "inet", "table": TABLE, "name": name, "type": kind, "flags": ["interval"],
    });
    if !prefixes.is_empty() {
        set["elem"] = prefixes.iter().map(element).collect();
    }
    json!({ "set": set })
}

/// Without what the kernel adds, and with a set's elements in one order.
fn normalise(mut object: Value) -> Value {
    for (_, fields) in object.as_object_mut().into_iter().flatten() {
        if let Some(fields) = fields.as_object_mut() {
            fields.remove("handle");
            if let Some(Value::Array(elements)) = fields.get_mut("elem") {
                elements.sort_by_key(Value::to_string);
            }
            // Newer and older versions of nft write one flag as a list or as a word.
            if let Some(flags @ Value::String(_)) = fields.get_mut("flags") {
                *flags = Value::Array(vec![flags.take()]);
            }
        }
    }
    object
}

/// Reads nft's listing.
fn parse(listing: &[u8]) -> Result<Actual, ReconcileError> {
    let broken = |what: &str| ReconcileError::new(OBJECT, format_args!("nft's listing: {what}"));
    let listing: Value = serde_json::from_slice(listing).map_err(|error| broken(&error.to_string()))?;
    let objects = listing.get("nftables").and_then(Value::as_array).ok_or_else(|| broken("no objects"))?;
    Ok(objects.iter().filter(|object| object.get("metainfo").is_none()).cloned().map(normalise).collect())
}

/// Keeps [`Desired::masquerade`]. Needs the program `nft`.
#[derive(Debug, Default)]
pub struct MasqueradeReconciler {
    /// Whether a table of ours may be there: nft is not started only to see that there is still none.
    idle: bool,
}

impl MasqueradeReconciler {
    /// For the network namespace of the calling thread.
    pub fn new() -> Self {
        Self::default()
    }

    async fn read(&self) -> Result<Actual, ReconcileError> {
        let output = nft(&["-j", "list", "table", "inet", TABLE], None).await?;
        match output.status.success() {
            true => parse(&output.stdout),
            false if String::from_utf8_lossy(&output.stderr).contains("No such file") => Ok(Vec::new()),
            false => Err(refused(&output)),
        }
    }

    async fn apply(&self, op: &Op) -> Result<(), ReconcileError> {
        // An add before the delete: a table that is not there cannot be deleted.
        let table = json!({ "table": { "family": "inet", "name": TABLE } });
        let mut commands = vec![json!({ "add": table }), json!({ "delete": table })];
        if let Op::Replace(objects) = op {
            commands.extend(objects.iter().map(|object| json!({ "add": object })));
        }
        let script = json!({ "nftables": commands }).to_string();
        let output = nft(&["-j", "-f", "-"], Some(script)).await?;
        if output.status.success() { Ok(()) } else { Err(refused(&output)) }
    }
}

fn refused(output: &Output) -> ReconcileError {
    let words = String::from_utf8_lossy(&output.stderr);
    let first = words.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    ReconcileError::new(OBJECT, format_args!("nft: {first}"))
}

async fn nft(arguments: &[&str], input: Option<String>) -> Result<Output, ReconcileError> {
    let run = async {
        let mut child = Command::new("nft")
            .args(arguments)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    run.await.map_err(|error| ReconcileError::new(OBJECT, format_args!("cannot run nft: {error}")))
}

impl Reconciler for MasqueradeReconciler {
    fn name(&self) -> &'static str {
        "masquerade"
    }

    fn stage(&self) -> Stage {
        Stage::Masquerade
    }

    fn reconcile<'a>(&'a mut self, desired: &'a Desired) -> BoxFuture<'a, Result<Report, ReconcileError>> {
        Box::pin(async move {
            let mut report = Report::default();
            let unwanted = desired.masquerade.is_none();
            if unwanted && (self.idle || !desired.prune) {
                return Ok(report);
            }
            for op in diff(&self.read().await?, desired) {
                report.record(self.apply(&op).await);
            }
            self.idle = unwanted && report.errors.is_empty();
            Ok(report)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn wish() -> Masquerade {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Masquerade {
            sources: nets(&["10.244.0.0/16", "fd00:244::/48"]),
            exceptions: nets(&["10.244.0.0/16", "10.244.1.0/24", "192.0.2.1/32", "fd00:244::/48"]),
            internal_links: ["margay0".to_owned(), "mgy*".to_owned()].into(),
        }
    }

    #[test]
    fn the_wish_for_what_is_there_changes_nothing_whatever_its_handles() {
        let mut listed = objects(&wish());
        for (at, object) in listed.iter_mut().enumerate() {
            let fields = object.as_object_mut().unwrap().values_mut().next().unwrap();
            fields["handle"] = json!(at);
        }
        listed.insert(0, json!({ "metainfo": { "version": "1" } }));
        let listing = serde_json::to_vec(&json!({ "nftables": listed })).unwrap();
        let desired = Desired { masquerade: Some(wish()), prune: true, ..Desired::default() };
        assert_eq!(diff(&parse(&listing).unwrap(), &desired), []);
    }

    #[test]
    fn any_tampering_is_one_replacement() {
        let desired = Desired { masquerade: Some(wish()), prune: true, ..Desired::default() };
        let whole = objects(&wish());
        for at in 0..whole.len() {
            let mut tampered = whole.clone();
            tampered.remove(at);
            assert_eq!(diff(&tampered, &desired), [Op::Replace(whole.clone())]);
        }
        let nothing = Desired { prune: true, ..Desired::default() };
        assert_eq!(diff(&whole, &nothing), [Op::Remove]);
        assert_eq!(diff(&whole, &Desired::default()), [], "not before the sources have synced");
    }

    #[test]
    fn overlapping_exceptions_are_one_interval() {
        let text = serde_json::to_string(&objects(&wish())).unwrap();
        assert!(text.contains("10.244.0.0") && !text.contains("10.244.1.0"), "{text}");
    }

    #[test]
    fn a_listing_that_makes_no_sense_is_an_error() {
        assert!(parse(b"{").is_err() && parse(b"{}").is_err());
    }
}
