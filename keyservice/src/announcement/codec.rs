//! Annotations to announcement and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use super::{
    ANNOTATION_CAPABILITIES, ANNOTATION_ENDPOINTS, ANNOTATION_KEYS, ANNOTATION_POD_CIDRS,
    ANNOTATION_SIGNATURE, ANNOTATION_VERSION, ANNOTATIONS, Announcement, AnnouncementError, KeyClaim,
    MAX_CAPABILITIES, MAX_CAPABILITY_LEN, MAX_ENDPOINTS, MAX_KEYS, MAX_POD_CIDRS, MAX_VALUE_LEN, Signature,
    VERSION,
};

/// Characters of a bad value that an error quotes.
const QUOTE_LEN: usize = 64;

type Result<T> = std::result::Result<T, AnnouncementError>;

fn error(annotation: &'static str, problem: impl Into<String>) -> AnnouncementError {
    AnnouncementError { annotation, problem: problem.into() }
}

fn quote(text: &str) -> String {
    let start: String = text.chars().take(QUOTE_LEN).collect();
    let more = if start.len() < text.len() { "…" } else { "" };
    format!("{start:?}{more}")
}

pub(super) fn encode(announcement: &Announcement) -> BTreeMap<String, String> {
    let mut keys = announcement.keys.clone();
    sort(&mut keys);
    let values = [
        (ANNOTATION_VERSION, VERSION.to_string()),
        (ANNOTATION_KEYS, encode_keys(&keys)),
        (ANNOTATION_ENDPOINTS, join(&announcement.endpoints)),
        (ANNOTATION_CAPABILITIES, join(&announcement.capabilities)),
        (ANNOTATION_POD_CIDRS, join(&announcement.pod_cidrs)),
    ];
    let signature =
        announcement.signature.as_ref().map(|signature| (ANNOTATION_SIGNATURE, signature.to_string()));
    values.into_iter().chain(signature).map(|(name, value)| (name.to_owned(), value)).collect()
}

fn encode_keys(keys: &[KeyClaim]) -> String {
    // A list of plain structs with string and number fields always serialises.
    serde_json::to_string(keys).unwrap_or_default()
}

fn join<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

fn sort(keys: &mut [KeyClaim]) {
    keys.sort_by_key(|key| std::cmp::Reverse((key.epoch, key.public_key)));
}

pub(super) fn decode(name: &str, annotations: &BTreeMap<String, String>) -> Result<Option<Announcement>> {
    if !ANNOTATIONS.iter().any(|key| annotations.contains_key(*key)) {
        return Ok(None);
    }
    // The version first: under another one the rest may look like anything.
    let version = value(annotations, ANNOTATION_VERSION)?;
    if version != VERSION.to_string() {
        let problem =
            format!("version {} is not known here; this agent reads version {VERSION}", quote(version));
        return Err(error(ANNOTATION_VERSION, problem));
    }
    let mut keys: Vec<KeyClaim> = serde_json::from_str(value(annotations, ANNOTATION_KEYS)?)
        .map_err(|problem| error(ANNOTATION_KEYS, problem.to_string()))?;
    sort(&mut keys);
    let capabilities: Vec<String> =
        split(annotations, ANNOTATION_CAPABILITIES, MAX_CAPABILITIES, "a capability")?;
    let words: BTreeSet<String> = capabilities.iter().cloned().collect();
    if words.len() != capabilities.len() {
        return Err(error(ANNOTATION_CAPABILITIES, "a capability is named twice"));
    }
    let announcement = Announcement {
        name: name.to_owned(),
        keys,
        endpoints: split(annotations, ANNOTATION_ENDPOINTS, MAX_ENDPOINTS, "an address:port pair")?,
        capabilities: words,
        pod_cidrs: split(annotations, ANNOTATION_POD_CIDRS, MAX_POD_CIDRS, "a prefix")?,
        signature: signature(annotations)?,
    };
    validate(&announcement)?;
    Ok(Some(announcement))
}

fn signature(annotations: &BTreeMap<String, String>) -> Result<Option<Signature>> {
    if !annotations.contains_key(ANNOTATION_SIGNATURE) {
        return Ok(None);
    }
    let text = value(annotations, ANNOTATION_SIGNATURE)?;
    text.parse()
        .map(Some)
        .map_err(|problem| error(ANNOTATION_SIGNATURE, format!("{} {problem}", quote(text))))
}

fn value<'a>(annotations: &'a BTreeMap<String, String>, key: &'static str) -> Result<&'a str> {
    let value = annotations
        .get(key)
        .ok_or_else(|| error(key, "is missing, while other margay.io annotations are there"))?;
    if value.len() > MAX_VALUE_LEN {
        return Err(error(key, format!("is {} bytes long, more than {MAX_VALUE_LEN}", value.len())));
    }
    Ok(value)
}

fn split<T: FromStr>(
    annotations: &BTreeMap<String, String>,
    key: &'static str,
    limit: usize,
    what: &str,
) -> Result<Vec<T>> {
    let text = value(annotations, key)?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let count = text.split(',').count();
    if count > limit {
        return Err(error(key, format!("has {count} entries, more than {limit}")));
    }
    text.split(',')
        .map(|item| item.parse().map_err(|_| error(key, format!("{} is not {what}", quote(item)))))
        .collect()
}

pub(super) fn validate(announcement: &Announcement) -> Result<()> {
    check_keys(&announcement.keys).map_err(|problem| error(ANNOTATION_KEYS, problem))?;
    check_count(announcement.endpoints.len(), MAX_ENDPOINTS).map_err(|p| error(ANNOTATION_ENDPOINTS, p))?;
    for (index, endpoint) in announcement.endpoints.iter().enumerate() {
        let problem = check_endpoint(endpoint)
            .err()
            .or_else(|| announcement.endpoints[..index].contains(endpoint).then_some("is named twice"));
        if let Some(problem) = problem {
            return Err(error(ANNOTATION_ENDPOINTS, format!("{endpoint} {problem}")));
        }
    }
    check_count(announcement.capabilities.len(), MAX_CAPABILITIES)
        .map_err(|p| error(ANNOTATION_CAPABILITIES, p))?;
    for word in &announcement.capabilities {
        let printable = word.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
        if word.is_empty() || word.len() > MAX_CAPABILITY_LEN || !printable {
            let problem = format!(
                "{} is not a word of 1 to {MAX_CAPABILITY_LEN} printable ASCII characters",
                quote(word)
            );
            return Err(error(ANNOTATION_CAPABILITIES, problem));
        }
    }
    check_count(announcement.pod_cidrs.len(), MAX_POD_CIDRS).map_err(|p| error(ANNOTATION_POD_CIDRS, p))?;
    check_prefixes(&announcement.pod_cidrs).map_err(|problem| error(ANNOTATION_POD_CIDRS, problem))
}

fn check_count(count: usize, limit: usize) -> std::result::Result<(), String> {
    if count > limit { Err(format!("has {count} entries, more than {limit}")) } else { Ok(()) }
}

fn check_keys(keys: &[KeyClaim]) -> std::result::Result<(), String> {
    if keys.is_empty() || keys.len() > MAX_KEYS {
        return Err(format!("has {} keys, not 1 to {MAX_KEYS}", keys.len()));
    }
    if let Some(key) = keys.iter().find(|key| key.port == 0) {
        return Err(format!("key {} has port 0", key.public_key));
    }
    for pair in keys.windows(2) {
        let [newer, older] = pair else { continue };
        if newer.public_key == older.public_key {
            return Err(format!("key {} is named twice", newer.public_key));
        }
        if newer.epoch == older.epoch {
            return Err(format!("both keys have epoch {}", newer.epoch));
        }
        if newer.epoch < older.epoch {
            return Err("the key of the newest epoch is not first".to_owned());
        }
        if newer.port == older.port {
            return Err(format!("both keys have port {}", newer.port));
        }
    }
    Ok(())
}

fn check_endpoint(endpoint: &SocketAddr) -> std::result::Result<(), &'static str> {
    let ip = endpoint.ip();
    if endpoint.port() == 0 {
        return Err("has port 0");
    }
    if ip.is_unspecified() {
        return Err("is the unspecified address");
    }
    if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err("is not the address of one host");
    }
    if ip.is_loopback() {
        return Err("is a loopback address, which no other host can reach");
    }
    if let SocketAddr::V6(v6) = endpoint {
        if v6.ip().to_ipv4_mapped().is_some() {
            return Err("is an IPv4 address written as IPv6");
        }
        if v6.ip().is_unicast_link_local() || v6.scope_id() != 0 || v6.flowinfo() != 0 {
            return Err("is link-local or has a zone, which means nothing on another host");
        }
    }
    Ok(())
}

fn check_prefixes(prefixes: &[IpNet]) -> std::result::Result<(), String> {
    for (index, prefix) in prefixes.iter().enumerate() {
        if prefix.trunc() != *prefix {
            return Err(format!("{prefix} has host bits set; the prefix would be {}", prefix.trunc()));
        }
        if let Some(other) = prefixes[..index].iter().find(|o| o.contains(prefix) || prefix.contains(*o)) {
            return Err(format!("{prefix} overlaps {other}"));
        }
    }
    Ok(())
}
