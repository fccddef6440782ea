{{- define "lensrack.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* The labels of selectors, which never change. Takes (dict "root" $ "part" "server"). */}}
{{- define "lensrack.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .part }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "lensrack.labels" -}}
{{ include "lensrack.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "lensrack.claim" -}}
{{- .Values.data.existingClaim | default (include "lensrack.name" .) -}}
{{- end -}}

{{/* The common settings, overridden by those of the part, overridden by those of the chart; sorted by name. Helm passes
     whole numbers as floats, which would be written as 1e+10. */}}
{{- define "lensrack.settings" -}}
{{- range $name, $value := mergeOverwrite (deepCopy .root.Values.settings) .own .fixed }}
- name: LENSRACK_{{ upper $name }}
  value: {{ ternary (int64 $value) $value (and (kindIs "float64" $value) (eq (floor $value) $value)) | toString | quote }}
{{- end }}
{{- end -}}

{{/* A pod of either part. Takes root, part, own (its values), fixed (settings that the chart decides), args, ports. */}}
{{- define "lensrack.pod" -}}
{{- $values := .root.Values -}}
{{- $password := $values.redis.passwordSecret.name -}}
{{- $keys := ternary $values.keys.secret.name "" (eq .part "server") -}}
{{- $fixed := dict
  "home" "/data"
  "store" (required "redis.url: expected the URL of a Redis, such as redis://redis:6379/0" $values.redis.url)
  "jobs" $values.redis.url
  "device" (ternary "cuda" "cpu" (gt (int .own.gpus) 0))
-}}
{{- if $password }}{{ $_ := set $fixed "redis_password_file" "/run/lensrack/redis_password" }}{{ end -}}
{{- $tag := $values.image.tag | default (printf "%s%s" .root.Chart.AppVersion (ternary "-cuda" "" (gt (int .own.gpus) 0))) -}}
metadata:
  labels:
    {{- include "lensrack.labels" (dict "root" .root "part" .part) | nindent 4 }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .own.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .own.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .grace }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "lensrack.selector" (dict "root" .root "part" .part) | nindent 10 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  containers:
    - name: {{ .part }}
      image: {{ printf "%s:%s" $values.image.repository $tag | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args: {{ toJson .args }}
      env:
        {{- include "lensrack.settings" (dict "root" .root "own" .own.settings "fixed" (merge $fixed .fixed)) | trim | nindent 8 }}
      ports: {{ toYaml .ports | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      resources:
        {{- $resources := deepCopy .own.resources }}
        {{- if gt (int .own.gpus) 0 }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict "nvidia.com/gpu" (int .own.gpus))) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      {{- .probes | nindent 6 }}
      volumeMounts:
        - {name: data, mountPath: /data}
        - {name: tmp, mountPath: /tmp}
        {{- if $password }}
        - {name: redis-password, mountPath: /run/lensrack, readOnly: true}
        {{- end }}
        {{- if $keys }}
        - {name: keys, mountPath: /run/lensrack-keys, readOnly: true}
        {{- end }}
  volumes:
    - name: data
      persistentVolumeClaim: {claimName: {{ include "lensrack.claim" .root }}}
    - name: tmp
      emptyDir: {sizeLimit: 2Gi}
    {{- if $password }}
    - name: redis-password
      secret:
        secretName: {{ $password }}
        defaultMode: 0440
        items: [{key: {{ $values.redis.passwordSecret.key }}, path: redis_password}]
    {{- end }}
    {{- if $keys }}
    - name: keys
      secret:
        secretName: {{ $keys }}
        defaultMode: 0440
        items: [{key: {{ $values.keys.secret.key }}, path: keys}]
    {{- end }}
{{- end -}}
