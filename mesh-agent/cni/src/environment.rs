//! The call's parameters: environment variables of the specification's section 2.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::error::{CniError, ENVIRONMENT};

/// The variables as given; empty when absent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    pub(crate) command: String,
    pub(crate) container_id: String,
    pub(crate) netns: String,
    pub(crate) ifname: String,
    pub(crate) args: String,
}

fn bad(variable: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::new(ENVIRONMENT, format!("{variable}: {problem}"))
}

impl Environment {
    pub(crate) fn from_process() -> Self {
        let get = |name: &str| std::env::var(name).unwrap_or_default();
        Self {
            command: get("CNI_COMMAND"),
            container_id: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            ifname: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
        }
    }

    /// The container id and interface name, in the shape the specification wants.
    pub(crate) fn attachment(&self) -> Result<(&str, &str), CniError> {
        if self.container_id.is_empty() {
            return Err(bad("CNI_CONTAINERID", "is not set"));
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !self.container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !self.container_id.chars().all(word)
        {
            return Err(bad(
                "CNI_CONTAINERID",
                "must start with a letter or digit and go on with those, '_', '.', '-'",
            ));
        }
        let name = self.ifname.as_str();
        if name.is_empty() {
            return Err(bad("CNI_IFNAME", "is not set"));
        }
        // The kernel's own rules (net/core/dev.c, dev_valid_name).
        if name.len() > 15
            || matches!(name, "." | "..")
            || name.chars().any(|c| matches!(c, '/' | ':') || c.is_whitespace())
        {
            return Err(bad("CNI_IFNAME", "is not an interface name"));
        }
        Ok((&self.container_id, name))
    }

    /// `K=V;K=V` of CNI_ARGS.
    pub(crate) fn arguments(&self) -> Result<BTreeMap<&str, &str>, CniError> {
        self.args
            .split(';')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                pair.split_once('=').ok_or_else(|| bad("CNI_ARGS", format!("{pair:?} is not KEY=VALUE")))
            })
            .collect()
    }
}

/// An address, with or without a prefix length, as runtimes write them.
pub(crate) fn parse_address(text: &str) -> Option<IpAddr> {
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(container_id: &str, ifname: &str) -> Environment {
        Environment { container_id: container_id.to_owned(), ifname: ifname.to_owned(), ..Default::default() }
    }

    #[test]
    fn ids_and_names_the_specification_forbids_are_refused() {
        assert!(environment("a-1_b.c", "eth0").attachment().is_ok());
        for (id, name) in [
            ("", "eth0"),
            ("-a", "eth0"),
            ("a/../b", "eth0"),
            ("a", ""),
            ("a", ".."),
            ("a", "a/b"),
            ("a", "eth0:1"),
            ("a", "e t"),
            ("a", "sixteen-letters-"),
        ] {
            assert_eq!(environment(id, name).attachment().unwrap_err().code, ENVIRONMENT, "{id:?} {name:?}");
        }
    }

    #[test]
    fn arguments_are_pairs() {
        let with = |args: &str| Environment { args: args.to_owned(), ..Default::default() };
        assert_eq!(
            with("IgnoreUnknown=1;K8S_POD_NAME=a;X=").arguments().unwrap(),
            BTreeMap::from([("IgnoreUnknown", "1"), ("K8S_POD_NAME", "a"), ("X", "")])
        );
        assert!(with("").arguments().unwrap().is_empty());
        assert!(with("K8S_POD_NAME").arguments().unwrap_err().message.contains("CNI_ARGS"));
    }

    #[test]
    fn addresses_come_with_or_without_a_length() {
        assert_eq!(parse_address("10.0.0.1/24"), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(parse_address("fd00::1"), Some("fd00::1".parse().unwrap()));
        assert_eq!(parse_address("ten"), None);
    }
}
