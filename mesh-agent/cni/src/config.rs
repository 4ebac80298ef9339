//! The network configuration on standard input (specification section 1).

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use mesh_api::defaults;
use serde::Deserialize;
use serde_json::Value;

use crate::environment::parse_address;
use crate::error::{CONFIG, CniError, DECODE, VERSION};

/// Versions we read and answer in, oldest first.
pub(crate) const SUPPORTED: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What we read of it. Keys of the specification and of other plugins may stand beside these.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    /// Absent means the first version.
    #[serde(default = "first_version")]
    pub(crate) cni_version: String,
    #[serde(default)]
    pub(crate) name: String,
    /// The agent's socket.
    #[serde(default = "default_socket")]
    pub(crate) socket: PathBuf,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: Args,
    /// The interface is another plugin's work, before us in the list: we pass on what it made.
    #[serde(default)]
    pub(crate) chained: bool,
    #[serde(default)]
    pub(crate) prev_result: Option<Value>,
    /// GC: what is to stay. Some runtimes wrote it without the `valid-`.
    #[serde(rename = "cni.dev/valid-attachments", alias = "cni.dev/attachments", default)]
    valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: CniArgs,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct CniArgs {
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

fn first_version() -> String {
    SUPPORTED[0].to_owned()
}

fn default_socket() -> PathBuf {
    Path::new(defaults::RUN_DIR).join(defaults::CNI_SOCKET)
}

/// The version to answer in, whatever else is wrong with the input.
pub(crate) fn version_of(input: &[u8]) -> String {
    serde_json::from_slice::<Value>(input)
        .ok()
        .and_then(|value| value.get("cniVersion")?.as_str().map(str::to_owned))
        .filter(|version| SUPPORTED.contains(&version.as_str()))
        .unwrap_or_else(|| "1.1.0".to_owned())
}

impl Config {
    pub(crate) fn parse(input: &[u8]) -> Result<Self, CniError> {
        let config: Self = serde_json::from_slice(input)
            .map_err(|error| CniError::new(DECODE, format!("network configuration: {error}")))?;
        if !SUPPORTED.contains(&config.cni_version.as_str()) {
            return Err(CniError::new(
                VERSION,
                format!("cniVersion: {:?} is none of {}", config.cni_version, SUPPORTED.join(", ")),
            ));
        }
        Ok(config)
    }

    /// Whether the configuration's version knows what came with `since`.
    pub(crate) fn at_least(&self, since: &str) -> bool {
        let rank = |version: &str| SUPPORTED.iter().position(|known| *known == version);
        rank(&self.cni_version) >= rank(since)
    }

    /// The network's name, which every command but VERSION needs.
    pub(crate) fn network(&self) -> Result<&str, CniError> {
        if self.name.is_empty() {
            return Err(CniError::new(CONFIG, "name: is missing"));
        }
        Ok(&self.name)
    }

    /// Exact addresses asked for: `runtimeConfig.ips`, else `args.cni.ips`, else `IP=` of CNI_ARGS.
    pub(crate) fn addresses(&self, argument: Option<&str>) -> Result<Vec<IpAddr>, CniError> {
        let (field, texts): (_, Vec<&str>) = if !self.runtime_config.ips.is_empty() {
            ("runtimeConfig.ips", self.runtime_config.ips.iter().map(String::as_str).collect())
        } else if !self.args.cni.ips.is_empty() {
            ("args.cni.ips", self.args.cni.ips.iter().map(String::as_str).collect())
        } else {
            ("CNI_ARGS IP", argument.unwrap_or_default().split(',').filter(|text| !text.is_empty()).collect())
        };
        texts
            .into_iter()
            .map(|text| {
                parse_address(text)
                    .ok_or_else(|| CniError::new(CONFIG, format!("{field}: {text:?} is not an IP address")))
            })
            .collect()
    }

    /// GC's list. Without one, nothing may be taken for stale.
    pub(crate) fn attachments(&self) -> Result<Vec<(String, String)>, CniError> {
        let list = self.valid_attachments.as_ref().ok_or_else(|| {
            CniError::new(
                CONFIG,
                "cni.dev/valid-attachments: is missing, and GC without it would take every pod's network",
            )
        })?;
        Ok(list.iter().map(|a| (a.container_id.clone(), a.ifname.clone())).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_place_that_names_addresses_counts() {
        let config = Config::parse(
            br#"{"cniVersion":"1.0.0","name":"m","runtimeConfig":{"ips":["10.0.0.5/24","fd00::5"]},
                 "args":{"cni":{"ips":["10.0.0.6"]}}}"#,
        )
        .unwrap();
        let expected: Vec<IpAddr> = ["10.0.0.5", "fd00::5"].map(|ip| ip.parse().unwrap()).to_vec();
        assert_eq!(config.addresses(Some("10.0.0.7")).unwrap(), expected);
        let config = Config::parse(br#"{"cniVersion":"1.0.0","name":"m"}"#).unwrap();
        assert_eq!(config.addresses(Some("10.0.0.7")).unwrap(), ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        assert!(config.addresses(None).unwrap().is_empty());
        assert!(config.addresses(Some("seven")).unwrap_err().message.contains("CNI_ARGS IP"));
    }

    #[test]
    fn unknown_versions_are_named() {
        let error = Config::parse(br#"{"cniVersion":"9.9.9","name":"m"}"#).unwrap_err();
        assert_eq!(error.code, VERSION);
        assert!(error.message.contains("9.9.9"), "{}", error.message);
    }

    #[test]
    fn gc_without_its_list_takes_nothing() {
        let config = Config::parse(br#"{"cniVersion":"1.1.0","name":"m"}"#).unwrap();
        assert_eq!(config.attachments().unwrap_err().code, CONFIG);
        let config = Config::parse(
            br#"{"cniVersion":"1.1.0","name":"m","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#,
        )
        .unwrap();
        assert_eq!(config.attachments().unwrap(), [("a".to_owned(), "eth0".to_owned())]);
    }

    proptest! {
        #[test]
        fn no_input_panics(input in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,200}") {
            let _ = Config::parse(&input);
            let _ = version_of(&input);
            let _ = Config::parse(format!("{{\"cniVersion\":{text:?},\"name\":{text:?}}}").as_bytes());
        }
    }
}
