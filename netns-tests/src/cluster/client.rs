//! Plain HTTP to the API server with the administrator's rights, through the `kubectl proxy` of its host: for a lab that
//! writes thousands of objects, where a process for each would be too slow.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::http::{self, Answer};

/// The field manager of what the lab applies.
pub const MANAGER: &str = "mesh-lab";

/// Longer than any request but a watch, which says itself how long it wants.
const LIMIT: Duration = Duration::from_secs(60);

/// Cheap to clone; goes with the host that it reaches.
#[derive(Debug, Clone)]
pub struct Client {
    pub(super) socket: PathBuf,
}

impl Client {
    /// A request; the answer may be an error.
    pub fn call(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Answer> {
        let what = || format!("{method} {path}");
        let mut stream =
            UnixStream::connect(&self.socket).context("reach kubectl proxy").with_context(what)?;
        stream.set_read_timeout(Some(LIMIT)).context("set time-out")?;
        let body = body.map(|(kind, body)| (kind, body.to_string()));
        let body = body.as_ref().map(|(kind, body)| (*kind, body.as_bytes()));
        http::exchange(&mut stream, method, path, body).with_context(what)
    }

    /// A request that must succeed.
    pub fn ask(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let answer = self.call(method, path, body)?.good().with_context(|| format!("{method} {path}"))?;
        serde_json::from_slice(&answer)
            .with_context(|| format!("{method} {path}: {}", String::from_utf8_lossy(&answer)))
    }

    /// Path of an object, or of a subresource of it, as the API server's discovery says.
    pub fn path(&self, object: &Value, subresource: Option<&str>) -> Result<String> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (version, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
        let root = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
        let known = self.ask("GET", &root, None)?;
        let of_kind = known["resources"].as_array().into_iter().flatten().find(|resource| {
            resource["kind"] == kind && !resource["name"].as_str().unwrap_or_default().contains('/')
        });
        let resource = of_kind.with_context(|| format!("{version} has no {kind}"))?;
        let plural = resource["name"].as_str().unwrap_or_default();
        let namespace = match (resource["namespaced"] == true, text("/metadata/namespace")) {
            (false, _) => String::new(),
            (true, "") => "namespaces/default/".into(),
            (true, namespace) => format!("namespaces/{namespace}/"),
        };
        let subresource = subresource.map(|name| format!("/{name}")).unwrap_or_default();
        Ok(format!("{root}/{namespace}{plural}/{name}{subresource}"))
    }

    /// Server-side apply of an object; its `status`, which the main resource does not take, is patched in, for a server-side
    /// apply has no room for two addresses of one type in a Node.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let mut object = object.clone();
        strip_nulls(&mut object);
        let path = self.path(&object, None)?;
        let status = object.as_object_mut().and_then(|fields| fields.remove("status"));
        let apply = format!("{path}?fieldManager={MANAGER}&force=true");
        self.ask("PATCH", &apply, Some(("application/apply-patch+yaml", &object)))?;
        if let Some(status) = status {
            let patch = format!("{path}/status?fieldManager={MANAGER}");
            self.ask("PATCH", &patch, Some(("application/merge-patch+json", &json!({ "status": status }))))?;
        }
        Ok(())
    }

    /// Deletes an object at once, as a node would finish it that nobody runs here; not being there is fine.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let path = self.path(object, None)?;
        let options = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
        let answer = self.call("DELETE", &path, Some(("application/json", &options)))?;
        if answer.status != 404 {
            answer.good().with_context(|| format!("DELETE {path}"))?;
        }
        if object["kind"] == "Namespace" {
            self.finish_namespace(&path)?;
        }
        Ok(())
    }

    /// A namespace waits for a controller that empties it, which no lab has.
    fn finish_namespace(&self, path: &str) -> Result<()> {
        let answer = self.call("GET", path, None)?;
        if answer.status == 404 {
            return Ok(());
        }
        let mut namespace: Value = serde_json::from_slice(&answer.good()?).context("the namespace")?;
        namespace["spec"]["finalizers"] = json!([]);
        self.ask("PUT", &format!("{path}/finalize"), Some(("application/json", &namespace))).map(drop)
    }

    /// The events of a watch (`PATH?watch=1…`) that ends by itself; `timeoutSeconds` in the path says when.
    pub fn watch(&self, path: &str) -> Result<Vec<Value>> {
        let answer = self.call("GET", path, None)?;
        // Too old a version may be refused before the stream begins.
        if answer.status == 410 {
            let status: Value = serde_json::from_slice(&answer.body).context("status of a watch")?;
            return Ok(vec![json!({"type": "ERROR", "object": status})]);
        }
        let body = answer.good().with_context(|| format!("GET {path}"))?;
        let events = serde_json::Deserializer::from_slice(&body).into_iter::<Value>();
        events.collect::<Result<_, _>>().context("events of a watch")
    }

    /// Whether it is ready for everything.
    pub fn ready(&self) -> Result<()> {
        let body = self.call("GET", "/readyz", None)?.good()?;
        if body != b"ok" {
            bail!("/readyz says {}", String::from_utf8_lossy(&body));
        }
        Ok(())
    }
}

/// A field without a value is no field.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(strip_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}
