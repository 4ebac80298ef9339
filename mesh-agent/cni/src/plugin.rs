//! One call: environment and configuration in, an answer or an error out.

use mesh_api::cni::{Command, Reply, Request};
use serde_json::{Value, json};

use crate::config::{Config, SUPPORTED};
use crate::environment::Environment;
use crate::error::{CHANGED, CONFIG, CniError, ENVIRONMENT, NOT_AVAILABLE, TRY_AGAIN, VERSION};
use crate::{exchange, result};

/// Carries out the call. `None` is success without output.
pub(crate) fn call(environment: &Environment, input: &[u8]) -> Result<Option<Value>, CniError> {
    let command = match environment.command.as_str() {
        "VERSION" => {
            let version = crate::config::version_of(input);
            return Ok(Some(json!({"cniVersion": version, "supportedVersions": SUPPORTED})));
        }
        "ADD" => Command::Add,
        "DEL" => Command::Del,
        "CHECK" => Command::Check,
        "GC" => Command::Gc,
        "STATUS" => Command::Status,
        "" => return Err(CniError::new(ENVIRONMENT, "CNI_COMMAND: is not set")),
        other => {
            let known = "ADD, DEL, CHECK, GC, STATUS or VERSION";
            return Err(CniError::new(ENVIRONMENT, format!("CNI_COMMAND: {other:?} is none of {known}")));
        }
    };
    let config = Config::parse(input)?;
    let since = match command {
        Command::Gc | Command::Status => "1.1.0",
        Command::Check => "0.4.0",
        Command::Add | Command::Del => SUPPORTED[0],
    };
    if !config.at_least(since) {
        let version = &config.cni_version;
        return Err(CniError::new(VERSION, format!("cniVersion: {version} has no {}", environment.command)));
    }
    if config.chained && command != Command::Status {
        return chained(command, environment, config);
    }
    let request = request(command, environment, &config)?;
    let netns = match command {
        Command::Add | Command::Check => Some(exchange::open_netns(&environment.netns)?),
        // A runtime may delete a pod whose namespace is long gone.
        Command::Del | Command::Gc | Command::Status => None,
    };
    match exchange::ask(&config.socket, &request, netns.as_ref()) {
        Ok(Reply::Done { result: given }) => answer(command, environment, &config, given),
        Ok(Reply::Failed { code, message, details }) => Err(CniError { code, message, details }),
        // STATUS has a code of its own for "not now".
        Err(error) if command == Command::Status && error.code == TRY_AGAIN => {
            Err(CniError { code: NOT_AVAILABLE, ..error })
        }
        Err(error) => Err(error),
    }
}

/// Behind the plugin of another CNI: what that one made stays as it is, and is answered on. Who the pod is, the agent knows
/// from its Pod object, so nothing has to wait for the agent here. STATUS does ask: a node whose traffic would not be
/// encrypted takes no pods.
fn chained(command: Command, environment: &Environment, config: Config) -> Result<Option<Value>, CniError> {
    if command != Command::Gc {
        environment.attachment()?;
    }
    match (command, config.prev_result) {
        (Command::Add, Some(before)) => Ok(Some(before)),
        (Command::Add | Command::Check, None) => Err(CniError::new(
            CONFIG,
            "prevResult: is missing; with \"chained\" mesh-cni comes after the plugin that makes the interface",
        )),
        _ => Ok(None),
    }
}

fn request(command: Command, environment: &Environment, config: &Config) -> Result<Request, CniError> {
    let mut request = Request {
        command,
        container_id: String::new(),
        ifname: String::new(),
        netns: environment.netns.clone(),
        network: config.network()?.to_owned(),
        pod_namespace: String::new(),
        pod_name: String::new(),
        pod_uid: String::new(),
        ips: Vec::new(),
        valid_attachments: Vec::new(),
    };
    match command {
        Command::Status => {}
        Command::Gc => request.valid_attachments = config.attachments()?,
        Command::Add | Command::Del | Command::Check => {
            let (container_id, ifname) = environment.attachment()?;
            let arguments = environment.arguments()?;
            let argument = |key: &str| arguments.get(key).copied().unwrap_or_default().to_owned();
            request.container_id = container_id.to_owned();
            request.ifname = ifname.to_owned();
            request.pod_namespace = argument("K8S_POD_NAMESPACE");
            request.pod_name = argument("K8S_POD_NAME");
            request.pod_uid = argument("K8S_POD_UID");
            request.ips = config.addresses(arguments.get("IP").copied())?;
        }
    }
    match (command, &config.prev_result) {
        (Command::Add, Some(_)) => Err(CniError::new(
            CONFIG,
            "prevResult: mesh-cni makes the pod's interface and must be the first plugin",
        )),
        (Command::Check, None) => Err(CniError::new(CONFIG, "prevResult: is missing, and CHECK needs it")),
        _ => Ok(request),
    }
}

fn answer(
    command: Command,
    environment: &Environment,
    config: &Config,
    given: Option<mesh_api::cni::Attachment>,
) -> Result<Option<Value>, CniError> {
    match (command, given) {
        (Command::Add, Some(given)) => {
            Ok(Some(result::added(config, &environment.ifname, &environment.netns, &given)))
        }
        (Command::Add, None) => Err(CniError::new(TRY_AGAIN, "mesh-agent gave no address")),
        (Command::Check, Some(given)) => {
            let before = config.prev_result.as_ref().map(result::addresses).unwrap_or_default();
            match given.addresses.iter().find(|address| !before.contains(&address.addr())) {
                Some(address) => Err(CniError::new(
                    CHANGED,
                    format!("prevResult: the pod has {}, which ADD's result does not name", address.addr()),
                )),
                None => Ok(None),
            }
        }
        _ => Ok(None),
    }
}
